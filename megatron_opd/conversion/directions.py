"""The two directions of a conversion, file by file: how each is written and compared again."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch

from megatron_opd.architectures.architecture import Architecture
from megatron_opd.files.manifest import CheckedFile, NewFile
from megatron_opd.weights.blocks import equal_bits
from megatron_opd.weights.distributed import (
    DistributedCheckpoint,
    Records,
    tensor_metadata,
    write_metadata,
    write_pieces,
)
from megatron_opd.weights.headers import Shape
from megatron_opd.weights.hf import HfCheckpoint, group_by_size, shard_names, write_index
from megatron_opd.weights.load import check_hf
from megatron_opd.weights.pieces import Piece, PieceReader, pieces_of
from megatron_opd.weights.safetensors_file import SafetensorsFile, write_safetensors
from megatron_opd.weights.table import hf_shapes, weight_table

FILE_BYTES = 5 * 10**8  # also how much is done anew after a crash


class Conversion(Protocol):
    """A direction of a conversion.

    `files` names every file of tensors, relative to the new directory. They can be written in any
    order.
    """

    @property
    def files(self) -> Mapping[str, Sequence[Piece]]: ...
    @property
    def dtype(self) -> torch.dtype: ...

    def write(self, file: NewFile, name: str) -> Records:
        """Writes file `name`. Returns the records that `differing` and `finish` need."""

    def differing(self, file: CheckedFile, name: str, records: Records) -> str | None:
        """The first tensor of a file that differs from its source in any bit, else None."""

    def finish(self, directory: Path, records: Mapping[str, Records]) -> None:
        """Makes the files a checkpoint, whose names, shapes and dtypes must be the model's."""


class ToMegatron:
    """Hugging Face -> `model/` of a directory, a distributed checkpoint."""

    def __init__(self, source: HfCheckpoint, arch: Architecture, dtype: torch.dtype) -> None:
        self.source = source
        self.arch = arch
        self.dtype: torch.dtype = dtype
        groups = _groups(pieces_of(arch), dtype)
        self.files = {f"model/__0_{i}.distcp": group for i, group in enumerate(groups, start=1)}

    def write(self, file: NewFile, name: str) -> Records:
        return write_pieces(file, self.files[name], self.source, self.dtype)

    def differing(self, file: CheckedFile, name: str, records: Records) -> str | None:
        path = Path(file.name)
        metadata = tensor_metadata({path.name: (self.files[name], records)}, self.dtype)
        written = DistributedCheckpoint(path.parent, metadata, file)
        return _differing(self.files[name], written, self.source, self.dtype)

    def finish(self, directory: Path, records: Mapping[str, Records]) -> None:
        files = {Path(name).name: (pieces, records[name]) for name, pieces in self.files.items()}
        write_metadata(directory / "model", tensor_metadata(files, self.dtype), self.arch)
        DistributedCheckpoint(directory / "model").check(self.arch)


class ToHf:
    """A distributed checkpoint -> safetensors."""

    def __init__(
        self, source: DistributedCheckpoint, arch: Architecture, dtype: torch.dtype
    ) -> None:
        self.source = source
        self.arch = arch
        self.dtype: torch.dtype = dtype
        groups = _groups(pieces_of(arch), dtype)
        self.files = dict(zip(shard_names(len(groups)), groups, strict=True))

    def write(self, file: NewFile, name: str) -> Records:
        tensors = (tensor for piece in self.files[name] for tensor in piece.hf_blocks(self.source))
        write_safetensors(file, self._shapes(name), self.dtype, tensors)
        return ()

    def differing(self, file: CheckedFile, name: str, records: Records) -> str | None:
        written = SafetensorsFile(Path(file.name), file)
        if (written.shapes, set(written.dtypes.values())) != (self._shapes(name), {self.dtype}):
            return "header"
        return _differing(self.files[name], self.source, written, self.dtype)

    def finish(self, directory: Path, records: Mapping[str, Records]) -> None:
        shards = {name: list(self._shapes(name)) for name in self.files}
        write_index(directory, shards, hf_shapes(weight_table(self.arch)), self.dtype)
        check_hf(directory, self.arch)

    def _shapes(self, name: str) -> dict[str, Shape]:
        return {
            tensor: shape for piece in self.files[name] for tensor, shape in piece.hf_shapes.items()
        }


def _groups(pieces: Sequence[Piece], dtype: torch.dtype) -> list[list[Piece]]:
    groups = group_by_size(
        {i: piece.shape for i, piece in enumerate(pieces)}, dtype.itemsize, FILE_BYTES
    )
    return [[pieces[i] for i in group] for group in groups]


def _differing(
    pieces: Sequence[Piece],
    stored: PieceReader,
    hf: HfCheckpoint | SafetensorsFile,
    dtype: torch.dtype,
) -> str | None:
    for piece in pieces:
        for name, blocks in piece.hf_blocks(stored):
            if not equal_bits(blocks, hf.blocks(name), dtype, name):
                return name
    return None
