"""The pieces that entries of the weight table are stored as in a Megatron checkpoint.

All layers' parameters of one kind are one stored tensor whose first axis is the layer; experts add
an axis for the expert. So the names say nothing of a layout, and any layout loads them. A `Piece`
is the smallest portion of a stored tensor that whole Hugging Face tensors make: the unit in which
either format is turned into the other. Source of the names: megatron-core 0.19 `sharded_state_dict`
of a GPT model of local layers; the tests compare.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megatron_opd.architectures.architecture import Architecture
from megatron_opd.weights.blocks import blocks_of
from megatron_opd.weights.hf import HfCheckpoint
from megatron_opd.weights.names import FUSED
from megatron_opd.weights.table import Entry, Same, Shape, Stacked, Transform, weight_table

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(?:mlp\.experts\.local_experts\.(\d+)\.)?(.+)")
_LINEAR = re.compile(r"linear_\w+\.weight$")


@dataclass(frozen=True)
class Piece:
    """The portion of a stored tensor that the tensors of `hf_shapes` make through `transform`.

    The stored tensor has leading axes of `leading` sizes, then `full_shape`; the piece is at
    `index` on the leading axes and begins at `row`. A `padded` tensor may be stored with further
    rows, which mean nothing.
    """

    key: str
    leading: Shape
    index: Shape
    full_shape: Shape
    row: int
    hf_shapes: Mapping[str, Shape]
    transform: Transform
    padded: bool

    @property
    def shape(self) -> Shape:
        """The piece's shape, without leading axes."""
        return (sum(shape[0] for shape in self.hf_shapes.values()), *self.full_shape[1:])

    @property
    def offsets(self) -> Shape:
        """The piece's first index on every axis of the stored tensor."""
        return (*self.index, self.row, *(0 for _ in self.full_shape[1:]))

    def blocks(self, source: HfCheckpoint) -> Iterable[Tensor]:
        """The piece's value in blocks, made of Hugging Face tensors."""
        if isinstance(self.transform, Same):
            (name,) = self.hf_shapes
            return source.blocks(name)
        return blocks_of(self.transform.merge([source.read(name) for name in self.hf_shapes]))

    def hf_blocks(self, source: "PieceReader") -> Iterator[tuple[str, Iterable[Tensor]]]:
        """The Hugging Face tensors that the piece's value makes, by name, in blocks."""
        if isinstance(self.transform, Same):
            (name,) = self.hf_shapes
            yield name, source.blocks(self)
            return
        tensors = self.transform.split(source.read(self))
        for name, tensor in zip(self.hf_shapes, tensors, strict=True):
            yield name, blocks_of(tensor)


class PieceReader(Protocol):
    """A distributed checkpoint that pieces are read from."""

    def read(self, piece: Piece) -> Tensor: ...
    def blocks(self, piece: Piece) -> Iterable[Tensor]: ...


def pieces_of(arch: Architecture) -> list[Piece]:
    """Every piece of a model, in the order of the weight table."""
    stored = [entry for entry in weight_table(arch) if not entry.is_copy]
    return [piece for entry in stored for piece in _split(entry, arch)]


def object_keys(arch: Architecture) -> list[str]:
    """Names of the empty objects beside the tensors: every linear layer's extra state."""
    keys = []
    for entry in weight_table(arch):
        key, index, sizes = _stored(entry, arch)
        if index and _LINEAR.search(key):
            shard = f"shard_{'.'.join(map(str, index))}_{'.'.join(map(str, sizes))}"
            keys.append(f"{key.removesuffix('weight')}_extra_state/{shard}")
    return keys


def _stored(entry: Entry, arch: Architecture) -> tuple[str, Shape, Shape]:
    """Key, position on the leading axes, and their sizes."""
    match = _LAYER.match(entry.megatron_name)
    if match is None:
        return entry.megatron_name, (), ()
    layer, expert, rest = match.groups()
    if expert is None:
        return f"decoder.layers.{FUSED.get(rest, rest)}", (int(layer),), (arch.num_layers,)
    assert arch.experts is not None
    sizes = (arch.num_layers, arch.experts.count)
    return f"decoder.layers.mlp.experts.experts.{rest}", (int(layer), int(expert)), sizes


def _split(entry: Entry, arch: Architecture) -> Iterator[Piece]:
    key, index, leading = _stored(entry, arch)
    padded = entry.partition.padded
    if not isinstance(entry.transform, Stacked):
        yield Piece(
            key, leading, index, entry.full_shape, 0, entry.hf_shapes, entry.transform, padded
        )
        return
    row = 0
    for name, shape in entry.hf_shapes.items():
        yield Piece(key, leading, index, entry.full_shape, row, {name: shape}, Same(), padded)
        row += shape[0]
