"""Tensors read, cast, compared and written a little at a time, in memory that is used again and
stays in the cache.

Where nothing changes on the way, the kernel copies an `Extent` from file to file; all else passes
in blocks. A block is one-dimensional, holds `BLOCK` elements (the last one fewer) and is valid
until the next one is taken. Memory lies within its page as the bytes lie in the file's: some
processors copy five times slower to an address that is a few bytes further into its page than the
source.
"""

import mmap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_opd.errors import DataError
from megatron_opd.files.manifest import NewFile

BLOCK = 2**18
PAGE = mmap.PAGESIZE


def blocks_of(tensor: Tensor) -> Iterator[Tensor]:
    return iter(tensor.reshape(-1).split(BLOCK) if tensor.numel() else ())


@dataclass(frozen=True)
class Extent:
    """Numbers that lie one after the other in a file, from byte `offset`: read in blocks, or whole.

    `opened`: the file, where it is to be read through an object of the caller's, in order. Reading
    raises DataError when the file ends before.
    """

    path: Path
    offset: int
    count: int
    dtype: torch.dtype
    opened: FileIO | None = None

    def __iter__(self) -> Iterator[Tensor]:
        buffer = _buffer(min(BLOCK, self.count), self.offset, self.dtype)
        with self._file() as file:
            for start in range(0, self.count, BLOCK):
                block = buffer[: self.count - start]
                _fill(file, block, self.path)
                yield block

    def read(self) -> Tensor:
        tensor = torch.empty(self.count, dtype=self.dtype)
        with self._file() as file:
            for block in blocks_of(tensor):
                _fill(file, block, self.path)
        return tensor

    @contextmanager
    def _file(self) -> Iterator[FileIO]:
        with nullcontext(self.opened) if self.opened else self.path.open("rb", buffering=0) as file:
            file.seek(self.offset)
            yield file


def cast(block: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """On the host and in `dtype`. Raises DataError when a number of tensor `name` is beyond
    float16's range."""
    result = block.to("cpu", dtype)
    if (
        dtype is torch.float16
        and block.dtype is not dtype
        and not torch.equal(result.isinf(), block.cpu().isinf())
    ):
        raise DataError(
            f"tensor {name}: holds numbers beyond float16's range; choose bfloat16 or float32"
        )
    return result


def write_blocks(file: NewFile, blocks: Iterable[Tensor], dtype: torch.dtype, name: str) -> int:
    """Appends tensor `name` to a file in `dtype`; returns the number of elements."""
    if isinstance(blocks, Extent) and blocks.dtype == dtype:
        try:
            file.copy(blocks.path, blocks.offset, blocks.count * dtype.itemsize)
        except EOFError:
            raise _too_short(blocks.path) from None
        return blocks.count
    count = 0
    for block in blocks:
        file.write(_bytes(cast(block, dtype, name)))
        count += block.numel()
    return count


def equal_bits(
    ours: Iterable[Tensor], theirs: Iterable[Tensor], dtype: torch.dtype, name: str
) -> bool:
    """Whether two tensors are the same in `dtype`, bit for bit: a NaN equals itself, 0 does not
    equal -0."""
    pairs = zip(ours, theirs, strict=True)
    return all(
        np.array_equal(_words(cast(a, dtype, name)), _words(cast(b, dtype, name))) for a, b in pairs
    )


def _buffer(count: int, offset: int, dtype: torch.dtype) -> Tensor:
    start = 0 if offset % dtype.itemsize else offset % PAGE
    memory = torch.frombuffer(
        mmap.mmap(-1, start + max(1, count * dtype.itemsize)), dtype=torch.uint8
    )
    return memory[start : start + count * dtype.itemsize].view(dtype)


def _bytes(block: Tensor) -> np.ndarray:
    return block.contiguous().view(torch.uint8).numpy()


def _words(block: Tensor) -> np.ndarray:
    """Eight bytes at a time where they divide."""
    data = _bytes(block)
    return data if data.size % 8 else data.view(np.int64)


def _fill(file: FileIO, block: Tensor, path: Path) -> None:
    view = memoryview(_bytes(block))
    while len(view):
        count = file.readinto(view)
        if not count:
            raise _too_short(path)
        view = view[count:]


def _too_short(path: Path) -> DataError:
    return DataError(f"{path}: ends too early; copy it again")
