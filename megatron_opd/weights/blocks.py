"""Tensors read, cast, compared and written block by block, in one buffer that stays in the cache.

A block is one-dimensional, holds `BLOCK` elements (the last one fewer) and is valid until the next
one is taken. An `Extent` whose numbers do not change is not read: the kernel copies it from file to
file. A buffer has the same offset within its memory page as the bytes have within theirs in the
file, because some processors copy five times slower otherwise.
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
    """The elements of a tensor in blocks; no block for an empty one."""
    return iter(tensor.reshape(-1).split(BLOCK) if tensor.numel() else ())


@dataclass(frozen=True)
class Extent:
    """`count` numbers that lie one after the other in a file, from byte `offset`.

    Iterating reads them in blocks, `read` all at once. `opened` is the caller's file object to read
    through, in order; without it the file is opened for every reading. Reading raises DataError
    when the file is too short.
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
        """All numbers, in one dimension, on the host."""
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
    """The block on the host and in `dtype`.

    Raises DataError naming the tensor when float16 cannot hold a number.
    """
    result = block.to("cpu", dtype)
    narrowed = dtype is torch.float16 and block.dtype is not dtype
    if narrowed and not torch.equal(result.isinf(), block.cpu().isinf()):
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
    blocks: Iterable[Tensor], others: Iterable[Tensor], dtype: torch.dtype, name: str
) -> bool:
    """True when two tensors have the same bits in `dtype`: NaN equals itself, 0 is not -0."""
    for block, other in zip(blocks, others, strict=True):
        if not np.array_equal(_words(cast(block, dtype, name)), _words(cast(other, dtype, name))):
            return False
    return True


def _buffer(count: int, offset: int, dtype: torch.dtype) -> Tensor:
    """Memory for `count` numbers, whose address has the offset within its page of file offset."""
    start = 0 if offset % dtype.itemsize else offset % PAGE
    size = count * dtype.itemsize
    memory = torch.frombuffer(mmap.mmap(-1, start + max(1, size)), dtype=torch.uint8)
    return memory[start : start + size].view(dtype)


def _bytes(block: Tensor) -> np.ndarray:
    return block.contiguous().view(torch.uint8).numpy()


def _words(block: Tensor) -> np.ndarray:
    """The block's bytes as integers of 8 bytes, which compare faster, if they divide by 8."""
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
