"""The one table that says which Hugging Face tensors make which Megatron parameter.

Load, export and refit read it; none of them knows a model. An `Entry` joins three independent
facts: the names on both sides, a `Transform` between their values, and the `Partition` of the
Megatron value over tensor-parallel ranks. A new model, layer spec or expert layer adds entries (and
a transform, if its layout is new); nothing else changes. `check` reads names and shapes here, so
torch is imported only where values are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from megatron_opd.architectures.architecture import Architecture

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]


def _concatenate(parts: "list[Tensor]", dim: int = 0) -> "Tensor":
    import torch

    return torch.cat(parts, dim)


# --------------------------------------------------------------------------------------- transforms
class Transform(Protocol):
    """Between the tensors of a checkpoint and one whole Megatron tensor. `split` undoes `merge` bit
    for bit."""

    def merge(self, parts: "list[Tensor]") -> "Tensor":
        """The checkpoint's tensors, in the entry's order -> the Megatron tensor, joined along
        dimension 0."""

    def split(self, full: "Tensor") -> "list[Tensor]":
        """The Megatron tensor -> the checkpoint's tensors. They may be views of `full`."""


@dataclass(frozen=True)
class Same:
    """One tensor, the same on both sides."""

    def merge(self, parts: "list[Tensor]") -> "Tensor":
        (part,) = parts
        return part

    def split(self, full: "Tensor") -> "list[Tensor]":
        return [full]


@dataclass(frozen=True)
class Stacked:
    """`count` tensors of equal shape, one below the other: `linear_fc1` is [gate; up]."""

    count: int

    def merge(self, parts: "list[Tensor]") -> "Tensor":
        return _concatenate(parts)

    def split(self, full: "Tensor") -> "list[Tensor]":
        return list(full.chunk(self.count))


@dataclass(frozen=True)
class GroupedQkv:
    """Query, key and value, interleaved per query group: [the group's query heads; its key head;
    its value head] ..."""

    num_groups: int
    heads_per_group: int
    head_dim: int

    def merge(self, parts: "list[Tensor]") -> "Tensor":
        return _concatenate(
            [part.unflatten(0, (self.num_groups, -1)) for part in parts], 1
        ).flatten(0, 1)

    def split(self, full: "Tensor") -> "list[Tensor]":
        rows = [self.heads_per_group * self.head_dim, self.head_dim, self.head_dim]
        return [
            part.flatten(0, 1)
            for part in full.unflatten(0, (self.num_groups, -1)).split(rows, dim=1)
        ]


# --------------------------------------------------------------------------------------- partitions
@dataclass(frozen=True)
class Partition:
    """How a whole Megatron tensor lies on the tensor-parallel ranks; an expert's, on the
    expert-tensor-parallel ones.

    `dim` is the sliced dimension, None: every rank holds all of it. The tensor is `blocks` equal
    blocks along `dim`, each sliced for itself: a rank of [gate; up] holds [its slice of gate; its
    slice of up]. A `padded` tensor (the vocabulary) is first filled up with rows of zeros, so that
    all slices have the rows the model gives them.
    """

    dim: int | None
    blocks: int = 1
    padded: bool = False

    def shard(self, full: "Tensor", rank: int, size: int, num_rows: int) -> "Tensor":
        """The slice of `rank` among `size`: its own memory or a view of `full`. `num_rows` is for
        padding: its rows."""
        if self.padded:
            full = pad_rows(full, num_rows * size)
        if self.dim is None or size == 1:
            return full
        if full.shape[self.dim] % (self.blocks * size):
            raise ValueError(
                f"{tuple(full.shape)} does not divide into {size} slices along dimension {self.dim}"
            )
        return _concatenate(
            [block.chunk(size, self.dim)[rank] for block in full.chunk(self.blocks, self.dim)],
            self.dim,
        )

    def gather(self, shards: "list[Tensor]") -> "Tensor":
        """The whole tensor from the slices of all ranks, padding included."""
        if self.dim is None or len(shards) == 1:
            return shards[0]
        by_rank = [shard.chunk(self.blocks, self.dim) for shard in shards]
        return _concatenate([blocks[i] for i in range(self.blocks) for blocks in by_rank], self.dim)


def pad_rows(full: "Tensor", num_rows: int) -> "Tensor":
    """`full` with rows of zeros added until it has `num_rows`."""
    if full.shape[0] >= num_rows:
        return full
    return _concatenate([full, full.new_zeros(num_rows - full.shape[0], *full.shape[1:])])


REPLICATED = Partition(None)
ROWS = Partition(0)
GATED_ROWS = Partition(0, blocks=2)
COLUMNS = Partition(1)
VOCABULARY = Partition(0, padded=True)


# ------------------------------------------------------------------------------------------ entries
@dataclass(frozen=True)
class Entry:
    """One Megatron parameter. `{layer}` in its name is already the layer's index in the whole
    model, from 0."""

    megatron_name: str
    hf_shapes: Mapping[str, Shape]  # the checkpoint's tensors in the transform's order
    partition: Partition
    transform: Transform = field(default=Same())
    # of an expert: its number in the layer; one expert-parallel rank has it
    expert: int | None = None
    # the same tensor is another entry's: loaded, never exported, absent from some layouts
    is_copy: bool = False

    @property
    def hf_names(self) -> tuple[str, ...]:
        return tuple(self.hf_shapes)

    @property
    def full_shape(self) -> Shape:
        """The shape of the whole Megatron tensor, without padding."""
        shapes = list(self.hf_shapes.values())
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def shard(self, parts: "list[Tensor]", rank: int, size: int, shape: Shape) -> "Tensor":
        """The checkpoint's tensors -> the value of tensor-parallel rank `rank` among `size`, of
        `shape`.

        Raises ValueError when the tensors do not make that shape: the model was built from another
        architecture.
        """
        value = self.partition.shard(self.transform.merge(parts), rank, size, num_rows=shape[0])
        if value.shape != shape:
            raise ValueError(
                f"{self.megatron_name} is {shape}, its checkpoint tensors make {tuple(value.shape)}"
            )
        return value

    def gather(self, shards: "list[Tensor]") -> "Tensor":
        """The values of all tensor-parallel ranks -> the whole Megatron tensor of `full_shape`."""
        return self.partition.gather(shards)[: self.full_shape[0]]

    def to_hf(self, full: "Tensor") -> "dict[str, Tensor]":
        """The whole Megatron tensor -> the checkpoint's tensors by name, each contiguous."""
        return {
            name: part.contiguous()
            for name, part in zip(self.hf_names, self.transform.split(full), strict=True)
        }


def weight_table(arch: Architecture) -> tuple[Entry, ...]:
    """The entries of a model of this architecture, in the checkpoint's order. Names: see
    `names.py`."""
    embedding: dict[str, Shape] = {"model.embed_tokens.weight": (arch.vocab_size, arch.hidden_size)}
    head = (
        embedding
        if arch.tie_word_embeddings
        else {"lm_head.weight": (arch.vocab_size, arch.hidden_size)}
    )
    return (
        Entry("embedding.word_embeddings.weight", embedding, VOCABULARY),
        *(entry for layer in range(arch.num_layers) for entry in _layer(arch, layer)),
        Entry(
            "decoder.final_layernorm.weight", {"model.norm.weight": (arch.hidden_size,)}, REPLICATED
        ),
        # Tied: a model of one stage has no such parameter; the last of several stages holds a copy
        # of the embedding.
        Entry("output_layer.weight", head, VOCABULARY, is_copy=arch.tie_word_embeddings),
    )


def hf_shapes(table: Sequence[Entry]) -> dict[str, Shape]:
    """Every checkpoint tensor the table knows, in its order."""
    return {
        name: shape
        for entry in table
        if not entry.is_copy
        for name, shape in entry.hf_shapes.items()
    }


def _layer(arch: Architecture, layer: int) -> list[Entry]:
    megatron, hf = f"decoder.layers.{layer}", f"model.layers.{layer}"
    norm = (arch.hidden_size,)
    return [
        Entry(
            f"{megatron}.input_layernorm.weight", {f"{hf}.input_layernorm.weight": norm}, REPLICATED
        ),
        *_attention(arch, f"{megatron}.self_attention", f"{hf}.self_attn"),
        Entry(
            f"{megatron}.pre_mlp_layernorm.weight",
            {f"{hf}.post_attention_layernorm.weight": norm},
            REPLICATED,
        ),
        *(_experts if arch.experts else _gated_mlp)(arch, f"{megatron}.mlp", f"{hf}.mlp"),
    ]


def _attention(arch: Architecture, megatron: str, hf: str) -> list[Entry]:
    groups, head = arch.num_key_value_heads, arch.head_dim
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
        ours, theirs = f"{megatron}.experts.local_experts.{e}", f"{hf}.experts.{e}"
        gate_up = {f"{theirs}.gate_proj.weight": wide, f"{theirs}.up_proj.weight": wide}
        down = {f"{theirs}.down_proj.weight": (wide[1], wide[0])}
        entries.append(
            Entry(f"{ours}.linear_fc1.weight", gate_up, GATED_ROWS, Stacked(2), expert=e)
        )
        entries.append(Entry(f"{ours}.linear_fc2.weight", down, COLUMNS, expert=e))
    return entries
