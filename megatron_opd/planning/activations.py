"""Bytes of activations of one micro-batch on one rank, layer by layer.

A micro-batch has T tokens, those of whole sequences end to end, with e bytes per element. H is the
hidden size; H' is H / TP under sequence parallelism and H without. Q, G and F are this rank's share
of the widths of query heads, key-value heads and MLP, V its share of the vocabulary. The count
follows the operations of our layers (local Megatron layers, our RMSNorm, SDPA);
tests/unit/test_planning_memory.py repeats it.

What a layer keeps for its backward pass, in elements per token:

    norm before attention   2 H'           its input, which is the residual stream, and its output
    qkv                     Q + 2 G        one tensor, kept whole because the value is a view of it
    query norm (Qwen3)      Q              its input, a copy: the qkv tensor is interleaved by group
    rotated query and key   Q + G
    attention               Q              its output; and one float32 per head
    norm before the MLP     2 H'
    gate and up             2 F            the output of linear_fc1
    silu(gate), up + 0      2 F            `up` is a tensor of its own: Megatron adds a number to it
    their product           F

and 4 T e head_dim for the cosines and sines. On CUDA a norm is one kernel, which keeps its input
and a float32 per row. On the host a norm, also of queries and keys, is composed of float32
operations that keep two float32 tensors instead of the input: the input and the normalised one.

With context parallelism of C a rank has T of the sequences' tokens. It keeps the keys and values
that its two slices of each sequence attend to, (2 C + 1) / 2 times its own (the host fills both
slices up to the longer one; its mask is not counted), and the qkv tensor only for the norms of
queries and keys.

With K experts of E for each token, each of width X, the last three lines are H + 5 X for each of
the T K rows that all ranks send to the experts of this one (routing is taken to be even): a row
itself, and what an MLP keeps. A rank with slices of experts has the rows of all ranks that share
them, and its share of the width. The router keeps 8 E + 16 K bytes of indices per token, and K
float32, or E if its softmax is over all experts. 5 E bytes per token of a layer's last pass, in any
phase, stay with the module.

By `train.recompute_granularity`, `selective` computes the last three lines again, and with `full` a
layer keeps its input alone. A pipeline stage keeps all this for every micro-batch that is in flight
there.
"""

from dataclasses import dataclass

from megatron_opd.architectures.architecture import Architecture
from megatron_opd.architectures.config import LayoutConfig
from megatron_opd.mcore.model import padded_vocab_size
from megatron_opd.vocab_parallel.blocks import BLOCK_ELEMENTS
from megatron_opd.vocab_parallel.linear import default_slab

FLOAT32 = 4


@dataclass(frozen=True)
class FullMicroBatch:
    """The sizes of one rank's micro-batch in a forward or backward pass of a model."""

    arch: Architecture
    layout: LayoutConfig
    element: int  # bytes of an activation: 2 or 4
    is_cuda: bool
    tokens: int
    predicted: int  # tokens that have logits

    # -------------------------------------------------------------------------- bytes of one tensor
    @property
    def hidden(self) -> int:
        """The residual stream outside of tensor-parallel regions."""
        ranks = self.layout.tensor_model_parallel_size if self.layout.sequence_parallel else 1
        return self.tokens * self.arch.hidden_size * self.element // ranks

    @property
    def whole_hidden(self) -> int:
        """The residual stream inside of tensor-parallel regions."""
        return self.tokens * self.arch.hidden_size * self.element

    def _heads(self, heads: int) -> int:
        whole = self.tokens * heads * self.arch.head_dim * self.element
        return whole // self.layout.tensor_model_parallel_size

    @property
    def query(self) -> int:
        """The queries of this rank's heads."""
        return self._heads(self.arch.num_attention_heads)

    @property
    def key(self) -> int:
        """The keys of this rank's heads; the values have as many bytes."""
        return self._heads(self.arch.num_key_value_heads)

    @property
    def attended(self) -> int:
        """The keys that this rank's queries attend to; the values have as many bytes."""
        ranks = self.layout.context_parallel_size
        if ranks == 1:
            return self.key
        return self.key * (2 * ranks + 1) // 2 if self.is_cuda else self.key * 2 * ranks

    @property
    def mlp(self) -> int:
        """A tensor of this rank's share of the MLP's width."""
        width = self.arch.intermediate_size // self.layout.tensor_model_parallel_size
        return self.tokens * width * self.element

    @property
    def rows(self) -> int:
        """The number of rows that this rank routes, K for a token; its experts get as many."""
        assert self.arch.experts is not None, "a dense model routes nothing"
        return self.hidden // self.element // self.arch.hidden_size * self.arch.experts.per_token

    @property
    def routed(self) -> int:
        """The hidden states of all rows."""
        return self.rows * self.arch.hidden_size * self.element

    @property
    def vocab_rows(self) -> int:
        """The number of this rank's rows of the vocabulary."""
        tp = self.layout.tensor_model_parallel_size
        return padded_vocab_size(self.arch, tp) // tp

    @property
    def logits(self) -> int:
        """All logits of this rank."""
        return self.predicted * self.vocab_rows * self.element

    @property
    def slab_logits(self) -> int:
        """The logits that exist at one time if the output layer is fused."""
        slab = default_slab(self.predicted, self.vocab_rows)
        return min(self.predicted, slab) * self.vocab_rows * self.element

    @property
    def head_hidden(self) -> int:
        """The hidden states of the tokens that have logits."""
        return self.predicted * self.arch.hidden_size * self.element

    @property
    def output_weight(self) -> int:
        """The number of elements of this rank's output layer."""
        return self.vocab_rows * self.arch.hidden_size


# ----------------------------------------------------------------------------------- kept by layers
def layer_saved(batch: FullMicroBatch) -> int:
    """Bytes that a layer keeps for its backward pass: the table above."""
    arch = batch.arch
    query = batch.query
    key = batch.key
    saved = 2 * (_norm(batch, batch.hidden) + batch.hidden)
    alone = batch.layout.context_parallel_size == 1
    saved += query + 2 * key if alone or arch.qk_norm else 0
    if arch.qk_norm:
        is_copy = arch.num_attention_heads > arch.num_key_value_heads
        saved += _head_norm(batch, query, is_copy=is_copy)
        saved += _head_norm(batch, key, is_copy=False)
    saved += query + (key if alone else 2 * batch.attended) + query
    heads = arch.num_attention_heads // batch.layout.tensor_model_parallel_size
    saved += batch.tokens * heads * FLOAT32
    saved += 4 * batch.tokens * arch.head_dim * batch.element
    return saved + _mlp_saved(batch)


def _mlp_saved(batch: FullMicroBatch) -> int:
    experts = batch.arch.experts
    if experts is None:
        return 5 * batch.mlp
    tokens = batch.rows // experts.per_token
    router = 8 * experts.count + 16 * experts.per_token
    weights = experts.per_token if experts.normalise_top else experts.count
    # int32: the end of each expert's rows.
    ends = 4 * experts.count // batch.layout.expert_model_parallel_size
    gathered = batch.layout.expert_tensor_parallel_size * (batch.routed + batch.rows * FLOAT32)
    in_experts = gathered + 5 * batch.rows * experts.intermediate_size * batch.element
    return in_experts + ends + tokens * (router + weights * FLOAT32)


def routing(batch: FullMicroBatch) -> int:
    """Bytes a layer keeps of its last pass: a float32 and a choice for each token and expert."""
    experts = batch.arch.experts
    return batch.rows // experts.per_token * experts.count * (FLOAT32 + 1) if experts else 0


def recomputed(batch: FullMicroBatch, granularity: str) -> int:
    """Bytes of `layer_saved` that a layer does not keep, but computes again."""
    again = {"none": 0, "selective": _mlp_saved(batch), "full": layer_saved(batch) - batch.hidden}
    return again[granularity]


def stage_saved(
    batch: FullMicroBatch, num_layers: int, granularity: str, *, first: bool, last: bool
) -> int:
    """Bytes that a stage keeps of a micro-batch: layers, embedding's ids, final norm's input."""
    ids = batch.tokens * 8 if first else 0
    layer = layer_saved(batch) - recomputed(batch, granularity)
    return num_layers * layer + ids + (_norm(batch, batch.hidden) if last else 0)


def _norm(batch: FullMicroBatch, size: int) -> int:
    """Bytes that a norm keeps besides its output; its input has `size` bytes."""
    elements = size // batch.element
    per_row = elements // batch.arch.hidden_size * FLOAT32
    return per_row + (size if batch.is_cuda else 2 * FLOAT32 * elements)


def _head_norm(batch: FullMicroBatch, size: int, *, is_copy: bool) -> int:
    """Bytes that a norm of heads keeps besides its output; its input has `size` bytes.

    An input that is no copy lies in the qkv tensor, which is kept anyway.
    """
    elements = size // batch.element
    per_row = elements // batch.arch.head_dim * FLOAT32
    if batch.is_cuda:
        return per_row + (size if is_copy else 0)
    upcast = batch.element < FLOAT32
    return per_row + FLOAT32 * elements * (2 if is_copy or upcast else 1)


# ------------------------------------------------------------------------------- alive for a moment
def head_training(batch: FullMicroBatch, *, fused: bool) -> int:
    """The most bytes at one time around the output layer, besides those that the layers keep.

    Logits become their own gradient (docs/vocab_parallel.md). The backward pass adds the gradients
    of hidden states and weight; a fused layer's weight gradient is accumulated in float32, and then
    becomes one in the parameter's dtype.
    """
    element = batch.element
    weight = batch.output_weight
    hidden = batch.head_hidden
    if not fused:
        gradients = hidden + weight * element
        return hidden + batch.logits + max(_scratch(batch, batch.logits), gradients)
    slab = batch.slab_logits
    product = weight * FLOAT32 if batch.is_cuda and element < FLOAT32 else 0
    in_slab = slab + max(product, _scratch(batch, slab))
    in_dtype = weight * element if element < FLOAT32 else 0
    backward = hidden + weight * FLOAT32 + max(in_slab, in_dtype)
    return hidden + max(slab + _scratch(batch, slab), backward)


def divergence_training(batch: FullMicroBatch) -> int:
    """Bytes of a term on the whole vocabulary: student's and teacher's logits, and a gradient."""
    return 3 * batch.logits


def layer_training(batch: FullMicroBatch, largest_parameter: int) -> int:
    """The most bytes at one time within a layer, besides those that the layers keep.

    A dense layer has most in its backward pass: the gradients of the stream, within the MLP, and of
    one weight. With experts there are the stream and, forward, the rows on their way less the copy
    that is kept, or, backward, the gradients of the rows and of all experts' weights in one linear
    layer.
    """
    if batch.arch.experts:
        forward = (_copies(batch) - 1) * batch.routed
        backward = batch.routed + largest_parameter * batch.element
        return batch.hidden + max(forward, backward)
    gathered = batch.whole_hidden if batch.layout.sequence_parallel else 0
    return batch.hidden + gathered + 2 * batch.mlp + largest_parameter * batch.element


def forward(batch: FullMicroBatch) -> int:
    """The most bytes at one time in a layer of a forward pass without a backward pass.

    Attention has the streams in and between, qkv, and four copies of the query while it is rotated.
    An MLP has what it would keep for a backward pass. Experts have the streams, the rows, and three
    indices or weights of each row.
    """
    gathered = batch.whole_hidden if batch.layout.sequence_parallel else 0
    attention = 3 * batch.hidden + gathered + batch.query + 3 * batch.key + 4 * batch.query
    if (ranks := batch.layout.context_parallel_size) > 1:
        attention += 2 * (ranks * batch.key + batch.attended)
    if batch.arch.experts is None:
        return max(attention, 4 * batch.hidden + gathered + 5 * batch.mlp)
    # Before the results of all experts exist, their wide activations do: four times X for a row, in
    # the place of two copies of it.
    wide = 4 * batch.arch.experts.intermediate_size / batch.arch.hidden_size - 2
    copies = _copies(batch) + max(wide, 0)
    return max(attention, 4 * batch.hidden + int(copies * batch.routed) + 24 * batch.rows)


def _copies(batch: FullMicroBatch) -> int:
    """The number of copies of the rows that exist at one time.

    Rows are gathered for the experts, sorted by expert, and become the experts' results, which are
    put in order; if the experts lie on several ranks, they are also sent and received. Sliced
    experts get the rows of all ranks that share them.
    """
    copies = 4 if batch.layout.expert_model_parallel_size == 1 else 5
    return copies * batch.layout.expert_tensor_parallel_size


def head_scoring(batch: FullMicroBatch) -> int:
    """Bytes of a frozen model's output layer, which scores slab by slab."""
    return batch.head_hidden + batch.slab_logits + _scratch(batch, batch.slab_logits)


def _scratch(batch: FullMicroBatch, logits: int) -> int:
    """Bytes of the host's buffers for a block of logits, two and their product; CUDA needs none."""
    return 0 if batch.is_cuda else 3 * FLOAT32 * min(BLOCK_ELEMENTS, logits // batch.element)
