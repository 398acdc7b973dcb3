"""Megatron's distributed checkpoints (`torch_dist`) read and written piece by piece.

    .metadata      pickled `torch.distributed.checkpoint` metadata: the place of every shard of
                   every stored tensor
    metadata.json  the format's name
    *.distcp       records one after the other, each a tensor or an object as `torch.save` writes it

Nothing here imports Megatron. `megatron.core.dist_checkpointing` loads the files written here, and
its own are read here, running no code that a file names (weights/metadata.py, weights/stored.py).
"""

import functools
import json
import math
import pickle
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_opd.architectures.architecture import Architecture
from megatron_opd.errors import DataError
from megatron_opd.files.manifest import NewFile
from megatron_opd.weights.blocks import PAGE, Extent, blocks_of, write_blocks
from megatron_opd.weights.hf import HfCheckpoint
from megatron_opd.weights.metadata import METADATA, read_metadata
from megatron_opd.weights.pieces import Piece, object_keys, pieces_of
from megatron_opd.weights.saved_tensor import envelope, open_record
from megatron_opd.weights.table import Shape

_OBJECTS = "__0_0.distcp"
_OPTIMIZER = "optimizer."
Records = Sequence[Sequence[int]]  # (offset, length) of each piece of a file
# The exceptions that `torch.load` and zipfile raise of a damaged record.
_DAMAGED = (
    OSError,
    RuntimeError,
    ValueError,
    EOFError,
    LookupError,
    zipfile.BadZipFile,
    pickle.PickleError,
)


class DistributedCheckpoint:
    """The tensors of a checkpoint directory.

    Every method raises DataError naming the tensor or file that is missing, damaged or unknown.
    """

    def __init__(
        self, directory: Path, metadata: Metadata | None = None, opened: FileIO | None = None
    ) -> None:
        self.directory = directory
        self.metadata = metadata or read_metadata(directory)
        self._opened = opened  # see Extent
        self._tensors: dict[str, TensorStorageMetadata] = {}
        for key, stored in self.metadata.state_dict_metadata.items():
            if isinstance(stored, TensorStorageMetadata):
                self._tensors[key] = stored
        self._storage: dict[MetadataIndex, _StorageInfo] = self.metadata.storage_data
        self._located: dict[tuple[str, Shape], Extent] = {}

    def check(self, arch: Architecture) -> torch.dtype:
        """Compares names, shapes and files with those of `arch`. Returns the weights' dtype.

        Reads the metadata and the sizes of files. Tensors of an optimizer are not checked.
        """
        pieces = pieces_of(arch)
        for piece in pieces:
            self._check_shape(piece)
            self._check_whole(piece)
        known = {piece.key for piece in pieces}
        for key in self._tensors:
            if key not in known and not key.startswith(_OPTIMIZER):
                raise DataError(
                    f"{self.directory}: tensor {key} is unexpected; its config.json describes "
                    "another model"
                )
        dtypes = {self._tensors[key].properties.dtype for key in known}
        if len(dtypes) > 1:
            raise DataError(
                f"{self.directory}: tensors of several dtypes "
                f"({', '.join(sorted(map(str, dtypes)))})"
            )
        return dtypes.pop()

    def read(self, piece: Piece) -> Tensor:
        """The piece's value, in `piece.shape`, read one stored shard at a time."""
        shards = self._shards(piece)
        if _is_whole(piece, shards):
            return self._locate(piece.key, shards[0]).read().view(piece.shape)
        full = torch.empty(piece.shape, dtype=self._tensors[piece.key].properties.dtype)
        for shard in shards:
            within_shard, within_piece = _overlap(piece, shard)
            value = self._locate(piece.key, shard).read().view(tuple(shard.sizes))
            full[within_piece] = value[(0,) * len(piece.index)][within_shard]
        return full

    def blocks(self, piece: Piece) -> Iterable[Tensor]:
        """The piece's value in blocks (weights/blocks.py).

        They come straight from the file if one shard holds the piece.
        """
        shards = self._shards(piece)
        if not _is_whole(piece, shards):
            return blocks_of(self.read(piece))
        return self._locate(piece.key, shards[0])

    # ------------------------------------------------------------------------------------ internals
    @functools.cached_property
    def _shards_at(self) -> dict[tuple[str, Shape], list[ChunkStorageMetadata]]:
        """Shards by key and every prefix of their offsets, one of which is a piece's index."""
        shards: dict[tuple[str, Shape], list[ChunkStorageMetadata]] = {}
        for key, tensor in self._tensors.items():
            for shard in tensor.chunks:
                for axes in range(min(3, len(shard.offsets))):
                    shards.setdefault((key, tuple(shard.offsets[:axes])), []).append(shard)
        return shards

    def _shards(self, piece: Piece) -> list[ChunkStorageMetadata]:
        """The stored shards that have numbers of the piece."""
        shards = self._shards_at.get((piece.key, piece.index), [])
        return [shard for shard in shards if _common_size(piece, shard)]

    def _check_shape(self, piece: Piece) -> None:
        if piece.key not in self._tensors:
            raise DataError(
                f"{self.directory}: tensor {piece.key} is missing; config.json describes another "
                "model"
            )
        tensor = self._tensors[piece.key]
        shape = tuple(tensor.size)
        expected = (*piece.leading, *piece.full_shape)
        if piece.padded:  # all tensor-parallel ranks had the same number of rows
            shards = len({shard.offsets[0] for shard in tensor.chunks})
            padded = (-(-expected[0] // shards) * shards, *expected[1:])
            expected = padded if shape == padded else expected
        if shape != expected:
            raise DataError(
                f"{self.directory}: tensor {piece.key} has shape {shape}; config.json says "
                f"{expected}"
            )

    def _check_whole(self, piece: Piece) -> None:
        size = 0
        for shard in self._shards(piece):
            size += _common_size(piece, shard)
            info = self._storage.get(MetadataIndex(piece.key, shard.offsets))
            path = self.directory / (info.relative_path if info else "")
            if info is None or not path.is_file():
                raise DataError(
                    f"{path}: missing, though {METADATA} lists it; copy the checkpoint again"
                )
            if path.stat().st_size < info.offset + info.length:
                raise DataError(f"{path}: truncated; copy the checkpoint again")
        if size != torch.Size(piece.shape).numel():
            raise DataError(
                f"{self.directory}: tensor {piece.key} is there in part only; copy the checkpoint "
                "again"
            )

    def _locate(self, key: str, shard: ChunkStorageMetadata) -> Extent:
        """The place of a stored shard's numbers; its record is opened once."""
        at = key, tuple(shard.offsets)
        if at not in self._located:
            self._located[at] = self._open(key, shard)
        return self._located[at]

    def _open(self, key: str, shard: ChunkStorageMetadata) -> Extent:
        """The place of a stored shard's numbers, read from its record and checked."""
        info = self._storage[MetadataIndex(key, shard.offsets)]
        path = self.directory / info.relative_path
        dtype = self._tensors[key].properties.dtype
        try:
            stored, start, size = open_record(path, info.offset, info.length)
        except _DAMAGED as error:
            raise DataError(
                f"{path}: truncated or damaged at {key} ({error}); copy the checkpoint again"
            ) from None
        shape = tuple(shard.sizes)
        as_promised = (shape, dtype, dtype.itemsize * stored.numel())
        if (tuple(stored.shape), stored.dtype, size) != as_promised:
            raise DataError(
                f"{path}: {key} is stored as {tuple(stored.shape)} {stored.dtype}, {METADATA} says "
                f"{shape} {dtype}"
            )
        if not stored.is_contiguous():
            raise DataError(f"{path}: {key} is stored in another order than that of its axes")
        return Extent(path, start, stored.numel(), dtype, self._opened)


# ------------------------------------------------------------------------------------------ writing
def write_pieces(
    file: NewFile, pieces: Sequence[Piece], source: HfCheckpoint, dtype: torch.dtype
) -> Records:
    """Writes one file of pieces. Returns offset and length of every piece's record in it."""
    records = []
    for piece in pieces:
        before, after = envelope(_stored_shape(piece), dtype)
        file.write(bytes(-(file.tell() + len(before)) % PAGE))  # the numbers begin with a page
        start = file.tell()
        file.write(before)
        write_blocks(file, piece.blocks(source), dtype, piece.key)
        file.write(after)
        records.append((start, file.tell() - start))
    return records


def tensor_metadata(
    files: Mapping[str, tuple[Sequence[Piece], Records]], dtype: torch.dtype
) -> Metadata:
    """The format's metadata of files that `write_pieces` wrote."""
    tensors: dict[str, TensorStorageMetadata] = {}
    storage = {}
    for name, (pieces, records) in files.items():
        for piece, (offset, length) in zip(pieces, records, strict=True):
            size = torch.Size((*piece.leading, *piece.full_shape))
            empty = TensorStorageMetadata(TensorProperties(dtype), size, [])
            tensor = tensors.setdefault(piece.key, empty)
            offsets = torch.Size(piece.offsets)
            index = MetadataIndex(piece.key, offsets, len(tensor.chunks))
            storage[index] = _StorageInfo(name, offset, length)
            tensor.chunks.append(ChunkStorageMetadata(offsets, torch.Size(_stored_shape(piece))))
    return Metadata(dict(tensors), storage_data=storage)


def write_metadata(directory: Path, metadata: Metadata, arch: Architecture) -> None:
    """Completes a directory of pieces: adds the objects that Megatron wants, and the metadata."""
    with (directory / _OBJECTS).open("wb") as file:
        torch.save([{}], file)
        end = file.tell()
        torch.save([None], file)
        empty = _StorageInfo(_OBJECTS, end, file.tell() - end)
    objects = {"common_state/shard_0_1": _StorageInfo(_OBJECTS, 0, end)} | dict.fromkeys(
        object_keys(arch), empty
    )
    for key, info in objects.items():
        metadata.state_dict_metadata[key] = BytesStorageMetadata()
        metadata.storage_data[MetadataIndex(key)] = info
    with (directory / METADATA).open("wb") as file:
        pickle.dump(metadata, file)
    (directory / "metadata.json").write_text(
        json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1})
    )


def _stored_shape(piece: Piece) -> Shape:
    """The piece's shape with its leading axes, each of which has one entry."""
    return (*(1 for _ in piece.index), *piece.shape)


def _shape(piece: Piece, shard: ChunkStorageMetadata) -> Shape:
    """The shard's shape without the piece's leading axes."""
    return tuple(shard.sizes[len(piece.index) :])


def _is_whole(piece: Piece, shards: Sequence[ChunkStorageMetadata]) -> bool:
    """True when the piece is stored as one shard, with nothing else in it."""
    places = [(tuple(shard.offsets), _shape(piece, shard)) for shard in shards]
    return places == [(piece.offsets, piece.shape)]


def _common_size(piece: Piece, shard: ChunkStorageMetadata) -> int:
    """The count of numbers that piece and shard have in common."""
    _, within_piece = _overlap(piece, shard)
    return math.prod(max(0, axis.stop - axis.start) for axis in within_piece)


def _overlap(
    piece: Piece, shard: ChunkStorageMetadata
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """The numbers that piece and shard have in common: as slices of the shard, and of the piece.

    A slice that stops before it starts: they have nothing in common.
    """
    axes = len(piece.index)
    starts = zip(piece.offsets[axes:], shard.offsets[axes:], strict=True)
    sizes = zip(piece.shape, _shape(piece, shard), strict=True)
    within_shard = []
    within_piece = []
    for (piece_start, shard_start), (piece_size, shard_size) in zip(starts, sizes, strict=True):
        start = max(piece_start, shard_start)
        stop = min(piece_start + piece_size, shard_start + shard_size)
        within_shard.append(slice(start - shard_start, stop - shard_start))
        within_piece.append(slice(start - piece_start, stop - piece_start))
    return tuple(within_shard), tuple(within_piece)
