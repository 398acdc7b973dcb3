"""Hugging Face model directories: safetensors read tensor by tensor, and a directory written whole or not at all."""

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_opd.errors import DataError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
Shape = tuple[int, ...]


class HfCheckpoint:
    """The tensors of a model directory. Opening it reads file headers only; `read` maps one tensor.

    `shapes` has every tensor by name. Opening raises DataError naming the file: missing, truncated, or without a
    tensor that the index promises.
    """

    def __init__(self, model_dir: str | Path) -> None:
        self.model_dir = Path(model_dir)
        self._files: dict[str, safe_open] = {}
        self.shapes: dict[str, Shape] = {}
        index = self._read_index()
        for file in sorted(set(index.values())) if index else [SINGLE]:
            self._open(file)
        for name, file in index.items():
            if name not in self.shapes:
                raise DataError(f"{self.model_dir / file}: tensor {name} is missing, though {INDEX} lists it there")

    def read(self, name: str) -> Tensor:
        """The tensor, on the host, in the checkpoint's dtype."""
        return self._files[name].get_tensor(name)

    def _read_index(self) -> dict[str, str]:
        path = self.model_dir / INDEX
        if (self.model_dir / SINGLE).is_file():
            return {}
        if not path.is_file():
            raise DataError(f"{self.model_dir}: holds neither {SINGLE} nor {INDEX}; save the model as safetensors")
        try:
            index = json.loads(path.read_text())["weight_map"]
            # File names only: an index must not lead outside of its directory.
            if all(Path(file).name == file for file in index.values()):
                return index
        except (ValueError, KeyError, TypeError, AttributeError):
            pass
        raise DataError(f"{path}: is not an index of safetensors files; copy the model directory again")

    def _open(self, name: str) -> None:
        path = self.model_dir / name
        if not path.is_file():
            raise DataError(f"{path}: missing, though {INDEX} lists it; copy the model directory again")
        try:
            file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise DataError(f"{path}: truncated or damaged ({error}); copy it again") from None
        for tensor in file.keys():  # noqa: SIM118 - not a mapping
            self.shapes[tensor] = tuple(file.get_slice(tensor).get_shape())
            self._files[tensor] = file


# ------------------------------------------------------------------------------------------------------------ writing
def plan_shards(shapes: Mapping[str, Shape], itemsize: int, max_shard_bytes: int) -> dict[str, list[str]]:
    """File name -> names of its tensors, in order. A file exceeds the limit only when a single tensor does."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        num_bytes = itemsize * torch.Size(shape).numel()
        if shards[-1] and size + num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += num_bytes
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards, start=1)}


def check_out_dir(out_dir: str | Path) -> None:
    """Raises DataError when the directory to be written is already there."""
    if Path(out_dir).exists():
        raise DataError(f"{out_dir}: already exists and is not overwritten; name a new directory or remove it")


def write_hf(
    out_dir: str | Path,
    source_dir: str | Path,
    tensors: Iterable[tuple[str, Tensor]],
    shapes: Mapping[str, Shape],
    dtype: torch.dtype,
    max_shard_bytes: int,
    config_changes: Mapping[str, Any] | None = None,
) -> None:
    """Writes `tensors`, which come in the order of `shapes`, beside the config and tokenizer files of `source_dir`.

    `config_changes`: keys of config.json that get other values.
    At most one shard is held in memory. The directory gets its name when it is complete and on disk; a failure leaves
    nothing behind. Raises DataError when `out_dir` exists.
    """
    out_dir, source_dir = Path(out_dir), Path(source_dir)
    check_out_dir(out_dir)
    unfinished = out_dir.with_name(f".{out_dir.name}.unfinished-{os.getpid()}")
    unfinished.mkdir(parents=True)
    try:
        _write_shards(unfinished, tensors, plan_shards(shapes, dtype.itemsize, max_shard_bytes), shapes, dtype)
        _copy_companions(source_dir, unfinished, dtype, config_changes or {})
        for path in [*unfinished.iterdir(), unfinished]:
            _fsync(path)
        unfinished.rename(out_dir)
        _fsync(out_dir.parent)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _write_shards(
    directory: Path,
    tensors: Iterable[tuple[str, Tensor]],
    shards: Mapping[str, list[str]],
    shapes: Mapping[str, Shape],
    dtype: torch.dtype,
) -> None:
    stream = iter(tensors)
    for file, names in shards.items():
        shard = {}
        for expected in names:
            name, tensor = next(stream)
            if name != expected or tuple(tensor.shape) != shapes[name]:
                raise ValueError(f"tensor {name} {tuple(tensor.shape)} came, {expected} {shapes[expected]} was due")
            shard[name] = tensor.to("cpu", dtype)
        save_file(shard, directory / file, metadata={"format": "pt"})
    if (left := next(stream, None)) is not None:
        raise ValueError(f"tensor {left[0]} came after the last one")
    if len(shards) > 1:
        total_size = sum(dtype.itemsize * torch.Size(shape).numel() for shape in shapes.values())
        weight_map = {name: file for file, names in shards.items() for name in names}
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _copy_companions(source_dir: Path, directory: Path, dtype: torch.dtype, changes: Mapping[str, Any]) -> None:
    """Config, generation config, tokenizer and chat template. The config gets the dtype that is written."""
    for pattern in ("*.json", "*.jinja", "*.txt", "*.model"):
        for path in source_dir.glob(pattern):
            if not path.name.endswith(".index.json"):
                shutil.copyfile(path, directory / path.name)
    config = json.loads((source_dir / "config.json").read_text()) | changes
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    config[key] = str(dtype).removeprefix("torch.")
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
