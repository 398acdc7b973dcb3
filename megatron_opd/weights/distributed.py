"""Megatron's distributed checkpoint format (`torch_dist`) read and written piece by piece, without
Megatron.

    .metadata      pickled `torch.distributed.checkpoint` metadata: where every block of every
                   stored tensor is
    metadata.json  the format's name
    *.distcp       records one after the other, each a tensor or an object as `torch.save` writes it

`megatron.core.dist_checkpointing` loads what is written here, and what it saves is read here,
running no code that a file names (weights/metadata.py, weights/stored.py).
"""

import functools
import json
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


class DistributedCheckpoint:
    """The tensors of a checkpoint directory. Raises DataError naming what is missing, damaged or
    unknown."""

    def __init__(
        self, directory: Path, metadata: Metadata | None = None, opened: FileIO | None = None
    ) -> None:
        self.directory, self._opened = directory, opened  # see Extent
        self.metadata = metadata = metadata or read_metadata(directory)
        self._tensors = {
            k: v
            for k, v in metadata.state_dict_metadata.items()
            if isinstance(v, TensorStorageMetadata)
        }
        self._storage: dict[MetadataIndex, _StorageInfo] = metadata.storage_data
        self._located: dict[tuple[str, Shape], Extent] = {}

    def check(self, arch: Architecture) -> torch.dtype:
        """Holds names, shapes and files against the model's, from the metadata. Returns the dtype
        of the weights.

        The optimizer's tensors are let be.
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
        """The piece's value, in `piece.shape`. One stored block beside it is in memory at a
        time."""
        chunks = self._chunks(piece)
        if _is_one(piece, chunks):
            return self._locate(piece.key, chunks[0]).read().view(piece.shape)
        full = torch.empty(piece.shape, dtype=self._tensors[piece.key].properties.dtype)
        for chunk in chunks:
            there, here = _overlap(piece, chunk)
            value = self._locate(piece.key, chunk).read().view(tuple(chunk.sizes))
            full[here] = value[(0,) * len(piece.index)][there]
        return full

    def blocks(self, piece: Piece) -> Iterable[Tensor]:
        """The same in blocks (see weights/blocks.py), from the file where the piece is stored as
        one."""
        chunks = self._chunks(piece)
        if not _is_one(piece, chunks):
            return blocks_of(self.read(piece))
        return self._locate(piece.key, chunks[0])

    # ------------------------------------------------------------------------------------ internals
    @functools.cached_property
    def _chunks_at(self) -> dict[tuple[str, Shape], list[ChunkStorageMetadata]]:
        """By key and every prefix of the offsets: pieces know how many leading axes theirs have."""
        found: dict[tuple[str, Shape], list[ChunkStorageMetadata]] = {}
        for key, tensor in self._tensors.items():
            for chunk in tensor.chunks:
                for axes in range(min(3, len(chunk.offsets))):
                    found.setdefault((key, tuple(chunk.offsets[:axes])), []).append(chunk)
        return found

    def _chunks(self, piece: Piece) -> list[ChunkStorageMetadata]:
        chunks = self._chunks_at.get((piece.key, piece.index), [])
        return [c for c in chunks if all(s.start < s.stop for s in _overlap(piece, c)[1])]

    def _check_shape(self, piece: Piece) -> None:
        if piece.key not in self._tensors:
            raise DataError(
                f"{self.directory}: tensor {piece.key} is missing; config.json describes another "
                "model"
            )
        tensor = self._tensors[piece.key]
        found, expected = tuple(tensor.size), (*piece.leading, *piece.full_shape)
        if piece.padded:  # every tensor-parallel rank has held as many rows
            shards = len({chunk.offsets[0] for chunk in tensor.chunks})
            padded = (-(-expected[0] // shards) * shards, *expected[1:])
            expected = padded if found == padded else expected
        if found != expected:
            raise DataError(
                f"{self.directory}: tensor {piece.key} has shape {found}; config.json says "
                f"{expected}"
            )

    def _check_whole(self, piece: Piece) -> None:
        size = 0
        for chunk in self._chunks(piece):
            size += torch.Size([s.stop - s.start for s in _overlap(piece, chunk)[1]]).numel()
            info = self._storage.get(MetadataIndex(piece.key, chunk.offsets))
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

    def _locate(self, key: str, chunk: ChunkStorageMetadata) -> Extent:
        """The file of a stored block, and where in it the block's numbers are."""
        at = key, tuple(chunk.offsets)
        if at not in self._located:
            self._located[at] = self._open(key, chunk)
        return self._located[at]

    def _open(self, key: str, chunk: ChunkStorageMetadata) -> Extent:
        """The same, from the record itself."""
        info = self._storage[MetadataIndex(key, chunk.offsets)]
        path, dtype = self.directory / info.relative_path, self._tensors[key].properties.dtype
        try:
            stored, start, size = open_record(path, info.offset, info.length)
        except (
            OSError,
            RuntimeError,
            ValueError,
            EOFError,
            LookupError,
            zipfile.BadZipFile,
            pickle.PickleError,
        ) as e:
            raise DataError(
                f"{path}: truncated or damaged at {key} ({e}); copy the checkpoint again"
            ) from None
        shape = tuple(chunk.sizes)
        if (tuple(stored.shape), stored.dtype, size) != (
            shape,
            dtype,
            dtype.itemsize * stored.numel(),
        ):
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
    """Writes one file, which is unbuffered. Returns where each piece is in it."""
    records = []
    for piece in pieces:
        before, after = envelope((*(1 for _ in piece.index), *piece.shape), dtype)
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
    """What the format says of files that `write_pieces` wrote."""
    tensors: dict[str, TensorStorageMetadata] = {}
    storage = {}
    for name, (pieces, records) in files.items():
        for piece, (offset, length) in zip(pieces, records, strict=True):
            size = torch.Size((*piece.leading, *piece.full_shape))
            tensor = tensors.setdefault(
                piece.key, TensorStorageMetadata(TensorProperties(dtype), size, [])
            )
            at = torch.Size(piece.offsets)
            storage[MetadataIndex(piece.key, at, len(tensor.chunks))] = _StorageInfo(
                name, offset, length
            )
            tensor.chunks.append(
                ChunkStorageMetadata(at, torch.Size((*(1 for _ in piece.index), *piece.shape)))
            )
    return Metadata(dict(tensors), storage_data=storage)


def write_metadata(directory: Path, metadata: Metadata, arch: Architecture) -> None:
    """Completes a directory of piece files: the objects that Megatron asks for, and the
    metadata."""
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


def _shape(piece: Piece, chunk: ChunkStorageMetadata) -> Shape:
    return tuple(chunk.sizes[len(piece.index) :])


def _is_one(piece: Piece, chunks: Sequence[ChunkStorageMetadata]) -> bool:
    return [(tuple(chunk.offsets), _shape(piece, chunk)) for chunk in chunks] == [
        (piece.offsets, piece.shape)
    ]


def _overlap(
    piece: Piece, chunk: ChunkStorageMetadata
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """What piece and chunk have in common, as slices of the chunk and of the piece; empty slices
    where nothing."""
    axes = len(piece.index)
    extents = zip(
        piece.offsets[axes:], piece.shape, chunk.offsets[axes:], _shape(piece, chunk), strict=True
    )
    there, here = [], []
    for mine, size, at, length in extents:
        start, stop = max(mine, at), min(mine + size, at + length)
        there.append(slice(start - at, stop - at))
        here.append(slice(start - mine, stop - mine))
    return tuple(there), tuple(here)
