"""The headers of a model directory's safetensors files: name, shape and dtype of every tensor.

Reading them takes milliseconds whatever the size of the model. Imports no torch.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from megatron_opd.errors import DataError

Shape = tuple[int, ...]
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_LFS_POINTER = b"version https://git-lfs"
_LORA = "holds a LoRA adapter without its base model; merge the two and save the result"
_PICKLED = "holds pickled weights only, which can run code; save the model as safetensors"
# Files that a directory may hold in the place of safetensors weights, and the remedy.
_INSTEAD = {
    "adapter_config.json": _LORA,
    "adapter_model.safetensors": _LORA,
    "pytorch_model*.bin": _PICKLED,
    "*.gguf": "holds GGUF weights only; save the model as safetensors",
}


@dataclass(frozen=True)
class TensorHeader:
    """The place and kind of one stored tensor."""

    path: Path
    shape: Shape
    dtype: str  # as the format spells it: "BF16"
    offset: int  # of its first byte in the file


def read_header(path: Path) -> dict[str, TensorHeader]:
    """The tensors of one file by name.

    Raises DataError naming the file when it is truncated, damaged or no safetensors file.
    """
    try:
        with path.open("rb") as file:
            start = file.read(max(8, len(_LFS_POINTER)))
            if start == _LFS_POINTER:
                raise DataError(
                    f"{path}: a Git LFS pointer in the place of the weights; fetch them with git "
                    "lfs pull"
                )
            if not start:
                raise DataError(f"{path}: truncated or damaged (it is empty); copy it again")
            # checks the header, and the file's size against it
            with safe_open(path, framework="numpy"):
                size = int.from_bytes(start[:8], "little")
                file.seek(8)
                header = json.loads(file.read(size))
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"{path}: truncated or damaged ({error}); copy it again") from None
    header.pop("__metadata__", None)
    return {name: _tensor(path, entry, 8 + size) for name, entry in header.items()}


def _tensor(path: Path, entry: Mapping[str, Any], data: int) -> TensorHeader:
    return TensorHeader(
        path, tuple(entry["shape"]), entry["dtype"], data + entry["data_offsets"][0]
    )


def read_headers(model_dir: Path) -> dict[str, TensorHeader]:
    """Every tensor of a model directory by name.

    A single file with everything takes precedence over an index. Raises DataError naming a file
    that is missing or truncated, lacks a tensor of the index, or holds one that another file holds
    too without an index to choose between them.
    """
    index = _read_index(model_dir)
    if (model_dir / SINGLE).is_file():
        return read_header(model_dir / SINGLE)
    files = {file: read_header(model_dir / file) for file in sorted(set(index.values()))}
    for name, file in index.items():
        if name not in files[file]:
            raise DataError(
                f"{model_dir / file}: tensor {name} is missing, though {INDEX} lists it there"
            )
    headers: dict[str, TensorHeader] = {}
    for file, tensors in files.items():
        for name, header in tensors.items():
            if name in headers and name not in index:
                raise DataError(
                    f"{model_dir / file}: tensor {name} is in {headers[name].path.name} too; save "
                    "them anew"
                )
            if index.get(name, file) == file:
                headers[name] = header
    return headers


def weights_are_there(model_dir: Path) -> bool:
    """True when the directory has weights, and all the files that its index names."""
    try:
        _read_index(model_dir)
    except DataError:
        return False
    return True


def _read_index(model_dir: Path) -> dict[str, str]:
    """File name of every tensor; {} without an index. Raises DataError for a missing file."""
    path = model_dir / INDEX
    if not path.is_file():
        if not (model_dir / SINGLE).is_file():
            raise _no_weights(model_dir)
        return {}
    index = _parse_index(path)
    for file in sorted(set(index.values())):
        if not (model_dir / file).is_file():
            raise DataError(f"{model_dir / file}: missing, though {INDEX} names it; copy it there")
    return index


def check_unambiguous(model_dir: Path) -> None:
    """Raises DataError when a single file lies beside an index, so that readers may differ."""
    index = _read_index(model_dir)
    if (model_dir / SINGLE).is_file() and not set(index.values()) <= {SINGLE}:
        raise DataError(
            f"{model_dir}: holds {SINGLE} beside the files of {INDEX}, which vLLM would read; "
            "remove those or the file"
        )


def _parse_index(path: Path) -> dict[str, str]:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        # File names only: an index must not lead outside of its directory.
        if index and all(Path(file).name == file for file in index.values()):
            return index
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise DataError(f"{path}: is not an index of safetensors files; copy the model directory again")


def _no_weights(model_dir: Path) -> DataError:
    for pattern, problem in _INSTEAD.items():
        if any(model_dir.glob(pattern)):
            return DataError(f"{model_dir}: {problem}")
    if any(model_dir.glob("*.safetensors")):
        return DataError(
            f"{model_dir}: holds neither {SINGLE} nor {INDEX}, which says what is where; copy it "
            "there"
        )
    return DataError(
        f"{model_dir}: no *.safetensors file; it holds neither {SINGLE} nor {INDEX}: save the "
        "model so"
    )
