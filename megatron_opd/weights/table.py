"""The one table that says which Hugging Face tensors make which Megatron parameter.

Load, export and refit read it; none of them knows a model. An `Entry` joins three independent
facts: the names on both sides, a `Transform` between their values, and the `Partition` of the
Megatron value over tensor-parallel ranks. A new model, layer spec or expert layer adds entries (and
a transform, if it orders its rows anew); nothing else changes. `check` reads names and shapes here,
so that torch is imported only by the functions that handle values.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from megatron_opd.architectures.architecture import Architecture

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]


def _concatenate(tensors: "list[Tensor]", dim: int = 0) -> "Tensor":
    import torch

    return torch.cat(tensors, dim)


# --------------------------------------------------------------------------------------- transforms
class Transform(Protocol):
    """Turns a checkpoint's tensors into one whole Megatron tensor, and back without rounding."""

    def merge(self, tensors: "list[Tensor]") -> "Tensor":
        """The Megatron tensor: the checkpoint's, in the entry's order, joined along dimension 0."""

    def split(self, full: "Tensor") -> "list[Tensor]":
        """The checkpoint's tensors of a Megatron tensor. They may be views of `full`."""


@dataclass(frozen=True)
class Same:
    """One tensor, the same on both sides."""

    def merge(self, tensors: "list[Tensor]") -> "Tensor":
        (tensor,) = tensors
        return tensor

    def split(self, full: "Tensor") -> "list[Tensor]":
        return [full]


@dataclass(frozen=True)
class Stacked:
    """`count` tensors of equal shape, one below the other: `linear_fc1` is [gate; up]."""

    count: int

    def merge(self, tensors: "list[Tensor]") -> "Tensor":
        return _concatenate(tensors)

    def split(self, full: "Tensor") -> "list[Tensor]":
        return list(full.chunk(self.count))


@dataclass(frozen=True)
class GroupedQkv:
    """Query, key and value, interleaved per query group: [its query heads; its key; its value]."""

    num_groups: int
    heads_per_group: int
    head_dim: int

    def merge(self, tensors: "list[Tensor]") -> "Tensor":
        by_group = [tensor.unflatten(0, (self.num_groups, -1)) for tensor in tensors]
        return _concatenate(by_group, 1).flatten(0, 1)

    def split(self, full: "Tensor") -> "list[Tensor]":
        rows = [self.heads_per_group * self.head_dim, self.head_dim, self.head_dim]
        by_group = full.unflatten(0, (self.num_groups, -1))
        return [tensor.flatten(0, 1) for tensor in by_group.split(rows, dim=1)]


# --------------------------------------------------------------------------------------- partitions
@dataclass(frozen=True)
class Partition:
    """The slices of a whole Megatron tensor on tensor-parallel ranks (an expert's on its own ones).

    The tensor is sliced along dimension `dim`; None means that every rank has all of it. It is made
    of `stacked` equal tensors along `dim`, each sliced for itself: a rank of [gate; up] has [its
    slice of gate; its slice of up]. A `padded` tensor (the vocabulary) is first filled up with rows
    of zeros, so that all slices have the rows that the model gives them.
    """

    dim: int | None
    stacked: int = 1
    padded: bool = False

    def shard(self, full: "Tensor", rank: int, size: int, num_rows: int) -> "Tensor":
        """The slice of `rank` among `size` ranks; it may be a view of `full`.

        A padded tensor's slice gets `num_rows` rows. Raises ValueError when the tensor does not
        divide among the ranks.
        """
        if self.padded:
            full = pad_rows(full, num_rows * size)
        if self.dim is None or size == 1:
            return full
        if full.shape[self.dim] % (self.stacked * size):
            raise ValueError(
                f"{tuple(full.shape)} does not divide into {size} slices along dimension {self.dim}"
            )
        tensors = full.chunk(self.stacked, self.dim)
        return _concatenate([t.chunk(size, self.dim)[rank] for t in tensors], self.dim)

    def gather(self, shards: "list[Tensor]") -> "Tensor":
        """The whole tensor from the slices of all ranks, padding included."""
        if self.dim is None or len(shards) == 1:
            return shards[0]
        by_rank = [shard.chunk(self.stacked, self.dim) for shard in shards]
        slices = [tensors[i] for i in range(self.stacked) for tensors in by_rank]
        return _concatenate(slices, self.dim)


def pad_rows(full: "Tensor", num_rows: int) -> "Tensor":
    """`full` with rows of zeros added until it has `num_rows`."""
    if full.shape[0] >= num_rows:
        return full
    return _concatenate([full, full.new_zeros(num_rows - full.shape[0], *full.shape[1:])])


REPLICATED = Partition(None)
ROWS = Partition(0)
GATED_ROWS = Partition(0, stacked=2)
COLUMNS = Partition(1)
VOCABULARY = Partition(0, padded=True)


# ------------------------------------------------------------------------------------------ entries
@dataclass(frozen=True)
class Entry:
    """One Megatron parameter, whose name counts the layers of the whole model from 0."""

    megatron_name: str
    hf_shapes: Mapping[str, Shape]  # the checkpoint's tensors in the transform's order
    partition: Partition
    transform: Transform = field(default=Same())
    # An expert's number in its layer, which one expert-parallel rank has.
    expert: int | None = None
    # A copy of another entry's tensor is loaded, never exported, and absent from some layouts.
    is_copy: bool = False

    @property
    def hf_names(self) -> tuple[str, ...]:
        return tuple(self.hf_shapes)

    @property
    def full_shape(self) -> Shape:
        """The shape of the whole Megatron tensor, without padding."""
        shapes = list(self.hf_shapes.values())
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def shard(self, tensors: "list[Tensor]", rank: int, size: int, shape: Shape) -> "Tensor":
        """The value of tensor-parallel rank `rank` among `size`, made of the checkpoint's tensors.

        Raises ValueError when its shape is not `shape`: the model was built from another
        architecture.
        """
        value = self.partition.shard(self.transform.merge(tensors), rank, size, num_rows=shape[0])
        if value.shape != shape:
            raise ValueError(
                f"{self.megatron_name} is {shape}, its checkpoint tensors make {tuple(value.shape)}"
            )
        return value

    def gather(self, shards: "list[Tensor]") -> "Tensor":
        """The whole Megatron tensor, of `full_shape`, from all tensor-parallel ranks' values."""
        return self.partition.gather(shards)[: self.full_shape[0]]

    def to_hf(self, full: "Tensor") -> "dict[str, Tensor]":
        """The checkpoint's tensors of a whole Megatron tensor, by name, each contiguous."""
        tensors = zip(self.hf_names, self.transform.split(full), strict=True)
        return {name: tensor.contiguous() for name, tensor in tensors}


def weight_table(arch: Architecture) -> tuple[Entry, ...]:
    """The entries of a model of this architecture, in the checkpoint's order.

    weights/names.py gives a model's parameters the names used here.
    """
    vocabulary = (arch.vocab_size, arch.hidden_size)
    embedding: dict[str, Shape] = {"model.embed_tokens.weight": vocabulary}
    head = embedding if arch.tie_word_embeddings else {"lm_head.weight": vocabulary}
    norm = {"model.norm.weight": (arch.hidden_size,)}
    return (
        Entry("embedding.word_embeddings.weight", embedding, VOCABULARY),
        *(entry for layer in range(arch.num_layers) for entry in _layer(arch, layer)),
        Entry("decoder.final_layernorm.weight", norm, REPLICATED),
        # If tied, a model of one stage has no such parameter, and the last of several stages has a
        # copy of the embedding.
        Entry("output_layer.weight", head, VOCABULARY, is_copy=arch.tie_word_embeddings),
    )


def hf_shapes(table: Sequence[Entry]) -> dict[str, Shape]:
    """The shape of every checkpoint tensor of the table, by name, in its order."""
    shapes: dict[str, Shape] = {}
    for entry in table:
        if not entry.is_copy:
            shapes.update(entry.hf_shapes)
    return shapes


def _layer(arch: Architecture, layer: int) -> list[Entry]:
    megatron = f"decoder.layers.{layer}"
    hf = f"model.layers.{layer}"
    before: dict[str, Shape] = {f"{hf}.input_layernorm.weight": (arch.hidden_size,)}
    between: dict[str, Shape] = {f"{hf}.post_attention_layernorm.weight": (arch.hidden_size,)}
    mlp = _experts if arch.experts else _gated_mlp
    return [
        Entry(f"{megatron}.input_layernorm.weight", before, REPLICATED),
        *_attention(arch, f"{megatron}.self_attention", f"{hf}.self_attn"),
        Entry(f"{megatron}.pre_mlp_layernorm.weight", between, REPLICATED),
        *mlp(arch, f"{megatron}.mlp", f"{hf}.mlp"),
    ]


def _attention(arch: Architecture, megatron: str, hf: str) -> list[Entry]:
    groups = arch.num_key_value_heads
    head = arch.head_dim
    interleaved = GroupedQkv(groups, arch.num_attention_heads // groups, head)
    rows = {"q": arch.num_attention_heads * head, "k": groups * head, "v": groups * head}

    def qkv(kind: str, columns: Shape) -> Entry:
        shapes = {f"{hf}.{x}_proj.{kind}": (rows[x], *columns) for x in "qkv"}
        return Entry(f"{megatron}.linear_qkv.{kind}", shapes, ROWS, interleaved)

    entries = [qkv("weight", (arch.hidden_size,))]
    if arch.qkv_bias:
        entries.append(qkv("bias", ()))
    if arch.qk_norm:
        for x in "qk":
            norm = {f"{hf}.{x}_norm.weight": (head,)}
            entries.append(Entry(f"{megatron}.{x}_layernorm.weight", norm, REPLICATED))
    proj = {f"{hf}.o_proj.weight": (arch.hidden_size, rows["q"])}
    return [*entries, Entry(f"{megatron}.linear_proj.weight", proj, COLUMNS)]


def _gated_mlp(arch: Architecture, megatron: str, hf: str) -> list[Entry]:
    wide = (arch.intermediate_size, arch.hidden_size)
    gate_up = {f"{hf}.gate_proj.weight": wide, f"{hf}.up_proj.weight": wide}
    down = {f"{hf}.down_proj.weight": (arch.hidden_size, arch.intermediate_size)}
    return [
        Entry(f"{megatron}.linear_fc1.weight", gate_up, GATED_ROWS, Stacked(2)),
        Entry(f"{megatron}.linear_fc2.weight", down, COLUMNS),
    ]


def _experts(arch: Architecture, megatron: str, hf: str) -> list[Entry]:
    """Router and experts; in the Megatron name an expert has its number in the whole layer."""
    assert arch.experts is not None
    wide = (arch.experts.intermediate_size, arch.hidden_size)
    router = {f"{hf}.gate.weight": (arch.experts.count, arch.hidden_size)}
    entries = [Entry(f"{megatron}.router.weight", router, REPLICATED)]
    for e in range(arch.experts.count):
        expert = f"{megatron}.experts.local_experts.{e}"
        hf_expert = f"{hf}.experts.{e}"
        gate_up = {f"{hf_expert}.gate_proj.weight": wide, f"{hf_expert}.up_proj.weight": wide}
        down = {f"{hf_expert}.down_proj.weight": (wide[1], wide[0])}
        fc1 = f"{expert}.linear_fc1.weight"
        entries.append(Entry(fc1, gate_up, GATED_ROWS, Stacked(2), expert=e))
        entries.append(Entry(f"{expert}.linear_fc2.weight", down, COLUMNS, expert=e))
    return entries
