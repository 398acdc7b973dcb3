"""Tensors read, cast, compared and written a little at a time, in memory that is used again and stays in the cache.

A block is one-dimensional, holds `BLOCK` elements (the last one fewer) and is valid until the next one is taken.
Memory lies within its page as the bytes lie in the file's: some processors copy five times slower to an address that is
a few bytes further into its page than the source.
"""

import mmap
from collections.abc import Iterable, Iterator
from io import FileIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_opd.errors import DataError
from megatron_opd.manifest import NewFile

BLOCK = 2**18
PAGE = mmap.PAGESIZE


def blocks_of(tensor: Tensor) -> Iterator[Tensor]:
    return iter(tensor.reshape(-1).split(BLOCK) if tensor.numel() else ())


def read_blocks(path: Path, offset: int, count: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """`count` elements from byte `offset` of a file. Raises DataError when it ends before."""
    buffer = _buffer(min(BLOCK, count), offset, dtype)
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        for start in range(0, count, BLOCK):
            block = buffer[: count - start]
            _fill(file, block, path)
            yield block


def read_whole(path: Path, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    tensor = torch.empty(shape, dtype=dtype)
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        for block in blocks_of(tensor):
            _fill(file, block, path)
    return tensor


def cast(block: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """On the host and in `dtype`. Raises DataError when a number of tensor `name` is beyond float16's range."""
    result = block.to("cpu", dtype)
    if dtype is torch.float16 and block.dtype is not dtype and not torch.equal(result.isinf(), block.cpu().isinf()):
        raise DataError(f"tensor {name}: holds numbers beyond float16's range; choose bfloat16 or float32")
    return result


def write_blocks(file: NewFile, blocks: Iterable[Tensor], dtype: torch.dtype, name: str) -> int:
    """Appends tensor `name` to a file in `dtype`; returns the number of elements."""
    count = 0
    for block in blocks:
        file.write(_bytes(cast(block, dtype, name)))
        count += block.numel()
    return count


def equal_bits(ours: Iterable[Tensor], theirs: Iterable[Tensor], dtype: torch.dtype, name: str) -> bool:
    """Whether two tensors are the same in `dtype`, bit for bit: a NaN equals itself, 0 does not equal -0."""
    pairs = zip(ours, theirs, strict=True)
    return all(np.array_equal(_words(cast(a, dtype, name)), _words(cast(b, dtype, name))) for a, b in pairs)


def _buffer(count: int, offset: int, dtype: torch.dtype) -> Tensor:
    start = 0 if offset % dtype.itemsize else offset % PAGE
    memory = torch.frombuffer(mmap.mmap(-1, start + max(1, count * dtype.itemsize)), dtype=torch.uint8)
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
            raise DataError(f"{path}: ends too early; copy it again")
        view = view[count:]
