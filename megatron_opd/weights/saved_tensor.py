"""One tensor as `torch.save` writes it, within a longer file, without its numbers in memory.

Such a record is a zip archive of uncompressed files, one of which is the tensor's numbers.
"""

import functools
import io
import os
import tempfile
import zipfile
from pathlib import Path
from typing import IO, cast

import torch
from torch import Tensor


def open_record(path: Path, offset: int, length: int) -> tuple[Tensor, int, int]:
    """A record's tensor on the meta device, and its numbers' file offset and size in bytes.

    Raises the exceptions of torch and zipfile for a damaged record.
    """
    with path.open("rb", buffering=0) as file:
        record = cast(IO[bytes], _Portion(file, offset, length))
        tensor = torch.load(record, map_location="meta", weights_only=True)  # reads no numbers
        start, size = _numbers_in(record)
    return tensor, offset + start, size


@functools.cache
def envelope(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[bytes, bytes]:
    """The bytes that `torch.save` writes before and after the numbers of a tensor.

    Their CRC is 0, which torch does not check.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tensor")
        # Its numbers are never touched: they take no memory, and are a hole in the file.
        tensor = torch.empty(shape, dtype=dtype)
        with torch.serialization.skip_data():
            torch.save(tensor, path)
        with path.open("rb") as file:
            start, size = _numbers_in(file)
            file.seek(0)
            before = file.read(start)
            file.seek(start + size)
            return before, file.read()


def _numbers_in(record: IO[bytes]) -> tuple[int, int]:
    """Offset and size in bytes of the tensor's numbers within its record."""
    with zipfile.ZipFile(record) as archive:
        (info,) = [entry for entry in archive.infolist() if entry.filename.endswith("/data/0")]
    # A file's header has 30 bytes; the last four are the lengths of two fields behind it.
    record.seek(info.header_offset + 26)
    name_length = int.from_bytes(record.read(2), "little")
    extra_length = int.from_bytes(record.read(2), "little")
    return info.header_offset + 30 + name_length + extra_length, info.file_size


class _Portion(io.RawIOBase):
    """Bytes `offset : offset + length` of an unbuffered file, as a file."""

    def __init__(self, file: io.FileIO, offset: int, length: int) -> None:
        self._file = file
        self._offset = offset
        self._length = length
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        if start + offset < 0:
            raise ValueError(f"negative position {start + offset}")
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]
        count = max(0, min(len(buffer), self._length - self._position))
        data = os.pread(self._file.fileno(), count, self._offset + self._position)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
