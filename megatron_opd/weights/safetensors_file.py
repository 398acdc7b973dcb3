"""One safetensors file, read and written in blocks, so that no tensor need fit in memory."""

import json
from collections.abc import Iterable, Iterator, Mapping
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from megatron_opd.files.manifest import NewFile
from megatron_opd.weights.blocks import PAGE, Extent, write_blocks
from megatron_opd.weights.headers import Shape, TensorHeader, read_header

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def dtype_of(header: TensorHeader) -> torch.dtype | str:
    """The tensor's dtype, or its name in the file when it is not in `DTYPES`."""
    return DTYPES.get(header.dtype, header.dtype)


def extent(header: TensorHeader, opened: FileIO | None = None) -> Extent:
    """The place of a tensor's numbers, read through `opened` (see Extent).

    The tensor's dtype must be in `DTYPES`.
    """
    count = torch.Size(header.shape).numel()
    return Extent(header.path, header.offset, count, DTYPES[header.dtype], opened)


class SafetensorsFile:
    """A file's tensors: `shapes` and `dtypes` (see `dtype_of`) by name, and their numbers.

    Opening reads the header. Raises DataError naming the file when it is truncated or damaged.
    """

    def __init__(self, path: Path, opened: FileIO | None = None) -> None:
        self._headers = read_header(path)
        self._opened = opened  # see Extent
        self.shapes = {name: header.shape for name, header in self._headers.items()}
        self.dtypes = {name: dtype_of(header) for name, header in self._headers.items()}

    def blocks(self, name: str) -> Extent:
        return extent(self._headers[name], self._opened)


def write_safetensors(
    file: NewFile,
    shapes: Mapping[str, Shape],
    dtype: torch.dtype,
    tensors: Iterator[tuple[str, Iterable[Tensor]]],
) -> None:
    """Writes a file of the next `len(shapes)` tensors.

    They come in the order of `shapes`, each by name and as its blocks. Raises ValueError when
    another tensor, or another number of elements, comes.
    """
    file.write(_header(shapes, dtype))
    for expected, shape in shapes.items():
        name, blocks = next(tensors)
        if name != expected:
            raise ValueError(f"tensor {name} came, {expected} was due")
        if (count := write_blocks(file, blocks, dtype, name)) != torch.Size(shape).numel():
            raise ValueError(f"tensor {name} came with {count} elements, {shape} was due")


def _header(shapes: Mapping[str, Shape], dtype: torch.dtype) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + dtype.itemsize * torch.Size(shape).numel()
        entries[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % PAGE)  # the tensors begin with a page
    return len(text).to_bytes(8, "little") + text
