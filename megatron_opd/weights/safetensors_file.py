"""One safetensors file: its header, its tensors in blocks, and a file written without ever holding its tensors."""

import json
from collections.abc import Iterable, Iterator, Mapping
from io import FileIO
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_opd.errors import DataError
from megatron_opd.manifest import NewFile
from megatron_opd.weights.blocks import PAGE, Extent, write_blocks

Shape = tuple[int, ...]
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class SafetensorsFile:
    """`shapes` and `dtypes` by tensor name; a dtype that is not of `DTYPES` is its name in the file.

    Opening reads the header. Raises DataError naming the file when it is truncated or damaged.
    """

    def __init__(self, path: Path, opened: FileIO | None = None) -> None:
        self.path, self._opened = path, opened  # see Extent
        try:
            with safe_open(path, framework="pt"), path.open("rb") as file:  # it checks the header and the file's size
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size))
        except (SafetensorError, OSError, ValueError) as error:
            raise DataError(f"{path}: truncated or damaged ({error}); copy it again") from None
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        self.shapes: dict[str, Shape] = {name: tuple(entry["shape"]) for name, entry in tensors.items()}
        self.dtypes = {name: DTYPES.get(entry["dtype"], entry["dtype"]) for name, entry in tensors.items()}
        self._offsets = {name: 8 + size + entry["data_offsets"][0] for name, entry in tensors.items()}

    def read(self, name: str) -> Tensor:
        return self.blocks(name).read().view(self.shapes[name])

    def blocks(self, name: str) -> Extent:
        count = torch.Size(self.shapes[name]).numel()
        return Extent(self.path, self._offsets[name], count, self.dtypes[name], self._opened)


def write_safetensors(
    file: NewFile, shapes: Mapping[str, Shape], dtype: torch.dtype, tensors: Iterator[tuple[str, Iterable[Tensor]]]
) -> None:
    """Writes the next `len(shapes)` of `tensors`, each as its blocks, which come in the order of `shapes`."""
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
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % PAGE)  # the tensors begin with a page
    return len(text).to_bytes(8, "little") + text
