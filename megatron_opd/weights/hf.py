"""Hugging Face model directories: read tensor by tensor, and written whole or not at all."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from megatron_opd.errors import DataError
from megatron_opd.files.manifest import MANIFEST, NewFile, sync
from megatron_opd.weights.blocks import Extent, blocks_of
from megatron_opd.weights.fused import single_experts
from megatron_opd.weights.headers import INDEX, SINGLE, Shape, TensorHeader, read_headers
from megatron_opd.weights.safetensors_file import dtype_of, extent, write_safetensors

_ORIGIN = "origin.json"


class Origin(TypedDict):
    """The run's checkpoint that weights come from: its step, and the SHA-256 of its manifest."""

    step: int
    checkpoint_sha256: str


class HfCheckpoint:
    """The tensors of a model directory. Opening it reads file headers only.

    `shapes` and `dtypes` have every tensor by name; a dtype that is not in `DTYPES` is given by its
    name in the file. `headers` saves reading them again. Raises DataError as `read_headers` does.
    """

    def __init__(
        self, model_dir: str | Path, headers: Mapping[str, TensorHeader] | None = None
    ) -> None:
        self.model_dir = Path(model_dir)
        if headers is None:
            headers = single_experts(read_headers(self.model_dir))
        self._headers = headers
        self.shapes = {name: header.shape for name, header in self._headers.items()}
        self.dtypes = {name: dtype_of(header) for name, header in self._headers.items()}

    def read(self, name: str) -> Tensor:
        """The tensor, on the host, in the checkpoint's dtype."""
        return self.blocks(name).read().view(self.shapes[name])

    def blocks(self, name: str) -> Extent:
        """The tensor in blocks (weights/blocks.py)."""
        return extent(self._headers[name])


# ------------------------------------------------------------------------------------------ writing
def plan_shards(
    shapes: Mapping[str, Shape], itemsize: int, max_shard_bytes: int
) -> dict[str, list[str]]:
    """The tensor names of each file, in order; a file exceeds the limit only with one tensor."""
    shards = group_by_size(shapes, itemsize, max_shard_bytes)
    return dict(zip(shard_names(len(shards)), shards, strict=True))


def group_by_size[T](shapes: Mapping[T, Shape], itemsize: int, max_bytes: int) -> list[list[T]]:
    """The names of `shapes`, in order, in groups of at most `max_bytes` or of one name."""
    groups: list[list[T]] = [[]]
    size = 0
    for name, shape in shapes.items():
        num_bytes = itemsize * torch.Size(shape).numel()
        if groups[-1] and size + num_bytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += num_bytes
    return groups


def shard_names(count: int) -> list[str]:
    if count == 1:
        return [SINGLE]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def check_out_dir(out_dir: str | Path) -> None:
    """Raises DataError when the directory to be written is already there."""
    if Path(out_dir).exists():
        raise DataError(
            f"{out_dir}: already exists and is not overwritten; name a new directory or remove it"
        )


def write_hf(
    out_dir: str | Path,
    source_dir: str | Path,
    tensors: Iterable[tuple[str, Tensor]],
    shapes: Mapping[str, Shape],
    dtype: torch.dtype,
    max_shard_bytes: int,
    config_changes: Mapping[str, Any] | None = None,
    origin: Origin | None = None,
    ends: Sequence[int] = (),
) -> None:
    """Writes a model directory: `tensors`, with the config and tokenizer files of `source_dir`.

    The tensors come in the order of `shapes`, and each is written when it comes. `config_changes`
    are keys of config.json that get other values, `origin` says where the weights come from, and
    `ends` are the ids at which generation_config.json stops (none leaves it as it is). The
    directory gets its name when it is complete and on disk; a failure leaves nothing behind. Raises
    DataError when `out_dir` exists.
    """
    out_dir = Path(out_dir)
    source_dir = Path(source_dir)
    check_out_dir(out_dir)
    unfinished = out_dir.with_name(f".{out_dir.name}.unfinished-{os.getpid()}")
    unfinished.mkdir(parents=True)
    shards = plan_shards(shapes, dtype.itemsize, max_shard_bytes)
    stream = ((name, _blocks(name, tensor, shapes)) for name, tensor in tensors)
    try:
        for file, names in shards.items():
            with NewFile(unfinished / file) as shard:
                write_safetensors(shard, {name: shapes[name] for name in names}, dtype, stream)
        if (left := next(stream, None)) is not None:
            raise ValueError(f"tensor {left[0]} came after the last one")
        write_index(unfinished, shards, shapes, dtype)
        copy_companions(source_dir, unfinished, dtype, config_changes or {})
        if origin:
            (unfinished / _ORIGIN).write_text(json.dumps(origin) + "\n")
        if ends:
            write_ends(unfinished, ends)
        for path in [*unfinished.iterdir(), unfinished]:
            sync(path)
        unfinished.rename(out_dir)
        sync(out_dir.parent)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _blocks(name: str, tensor: Tensor, shapes: Mapping[str, Shape]) -> Iterator[Tensor]:
    if name in shapes and tuple(tensor.shape) != shapes[name]:
        raise ValueError(f"tensor {name} {tuple(tensor.shape)} came, {shapes[name]} was due")
    return blocks_of(tensor)


def write_index(
    directory: Path,
    shards: Mapping[str, list[str]],
    shapes: Mapping[str, Shape],
    dtype: torch.dtype,
) -> None:
    """Writes which file holds each tensor; a single file needs no index."""
    if len(shards) > 1:
        total_size = sum(dtype.itemsize * torch.Size(shape).numel() for shape in shapes.values())
        weight_map = {name: file for file, names in shards.items() for name in names}
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def read_origin(model_dir: Path) -> Origin | None:
    """The origin that `write_hf` wrote beside the weights; None without one."""
    try:
        origin = json.loads((model_dir / _ORIGIN).read_text())
        return {"step": int(origin["step"]), "checkpoint_sha256": str(origin["checkpoint_sha256"])}
    except (OSError, ValueError, LookupError, TypeError):
        return None


def companions(model_dir: Path) -> Iterator[Path]:
    """The files beside a model's weights: config, generation config, tokenizer, chat template."""
    for pattern in ("*.json", "*.jinja", "*.txt", "*.model"):
        for path in model_dir.glob(pattern):
            if not path.name.endswith(".index.json") and path.name not in (MANIFEST, _ORIGIN):
                yield path


def copy_companions(
    source_dir: Path, directory: Path, dtype: torch.dtype, changes: Mapping[str, Any]
) -> None:
    """Copies the files beside the weights; config.json gets `changes` and the dtype written."""
    for path in companions(source_dir):
        shutil.copyfile(path, directory / path.name)
    config = json.loads((source_dir / "config.json").read_text()) | changes
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    config[key] = str(dtype).removeprefix("torch.")
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_ends(directory: Path, ends: Sequence[int]) -> None:
    """Makes generation_config.json stop at all of `ends`, unless it already does."""
    path = directory / "generation_config.json"
    config = json.loads((directory / "config.json").read_text())
    # Without the file, transformers and vLLM take these from config.json.
    named = {key: config.get(key) for key in ("bos_token_id", "pad_token_id", "eos_token_id")}
    of_model = {key: value for key, value in named.items() if value is not None}
    settings = json.loads(path.read_text()) if path.is_file() else of_model
    stops = settings.get("eos_token_id", of_model.get("eos_token_id", []))
    if set(stops if isinstance(stops, list) else [stops]) >= set(ends):
        return
    settings["eos_token_id"] = list(ends) if len(ends) > 1 else ends[0]
    path.write_text(json.dumps(settings, indent=2) + "\n")
