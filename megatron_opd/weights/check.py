"""Checks that a model directory holds the whole model of its config.json. Imports no torch."""

import re
from pathlib import Path

from megatron_opd.architectures.architecture import Architecture
from megatron_opd.architectures.directory import holds_megatron_weights
from megatron_opd.errors import DataError
from megatron_opd.files.manifest import find_damage
from megatron_opd.weights.fused import single_experts
from megatron_opd.weights.headers import TensorHeader, check_unambiguous, read_headers
from megatron_opd.weights.table import hf_shapes, weight_table

# Constants that old checkpoints hold beside the weights.
IGNORED = re.compile(r"\.rotary_emb\.inv_freq$")
TIED_HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
READABLE = ("F64", "F32", "F16", "BF16")
_COMPARED = 2**16  # bytes of a tied output layer
# Suffixes of the tensors that quantised checkpoints store beside the weights.
_OF_QUANTISED = ("_scale", "_scale_inv", ".scales", ".qzeros", ".g_idx", ".absmax", ".quant_map")


def check_weights(model_dir: Path, arch: Architecture, *, sampled: bool = False) -> None:
    """Raises DataError when `model_dir` does not hold the whole weights of a model of `arch`.

    Hugging Face directories are checked from the headers of their files, Megatron ones from the
    sizes in their manifest. With `sampled`, vLLM loads the weights too, which reads safetensors
    only.
    """
    if not holds_megatron_weights(model_dir):
        if sampled:
            check_unambiguous(model_dir)
        check_headers(model_dir, arch)
        return
    if sampled:
        raise DataError(
            f"{model_dir}: holds Megatron weights, and vLLM samples from this model; "
            f"give a Hugging Face directory: megatron-opd convert {model_dir} OUT"
        )
    if problem := find_damage(model_dir, contents=False):
        raise DataError(f"{model_dir}: {problem}; convert the model again")


def check_headers(model_dir: Path, arch: Architecture) -> dict[str, TensorHeader]:
    """Compares names, shapes and dtypes of a Hugging Face directory with the weight table.

    Returns the headers by tensor name. Raises DataError naming a missing, unexpected, misshapen or
    quantised tensor, or an output layer whose first numbers are not the embedding's although the
    config ties them.
    """
    headers = single_experts(read_headers(model_dir))
    if adapter := next((name for name in headers if ".lora_" in name), None):
        raise DataError(
            f"{model_dir}: tensor {adapter} is of a LoRA adapter; merge it with its base and save "
            "the model"
        )
    # Checked before the table is made, which may be vast.
    if arch.num_layers * (arch.experts.count if arch.experts else 1) > len(headers):
        experts = f" of {arch.experts.count} experts" if arch.experts else ""
        raise DataError(
            f"{model_dir}: holds {len(headers)} tensors, too few for the {arch.num_layers} "
            f"layers{experts} of its config.json, which describes another model"
        )
    expected = hf_shapes(weight_table(arch))
    for name, shape in expected.items():
        if name not in headers:
            raise DataError(f"{model_dir}: tensor {name} is missing; {_why_missing(name, headers)}")
        header = headers[name]
        if header.dtype not in READABLE:
            raise DataError(
                f"{model_dir}: tensor {name} is {header.dtype}; save the model as BF16 or F32"
            )
        if header.shape != shape:
            raise DataError(
                f"{model_dir}: tensor {name} has shape {header.shape}; its config.json says {shape}"
            )
    tied_head = arch.tie_word_embeddings and TIED_HEAD in headers
    for name in headers:
        known = name in expected or IGNORED.search(name) or (tied_head and name == TIED_HEAD)
        if not known:
            raise DataError(f"{model_dir}: tensor {name} is unexpected; {_why_unexpected(name)}")
    if tied_head and not _begin_alike(headers[TIED_HEAD], headers[EMBEDDING]):
        raise not_tied(model_dir)
    return headers


def not_tied(model_dir: Path) -> DataError:
    """The error of an output layer that is not the embedding although the config ties them."""
    return DataError(
        f"{model_dir}: config.json ties the word embeddings, but {TIED_HEAD} differs from "
        f"{EMBEDDING}; set tie_word_embeddings to false there, or remove the tensor"
    )


def _why_missing(name: str, headers: dict[str, TensorHeader]) -> str:
    if name == TIED_HEAD:
        return (
            "save the model with it, or set tie_word_embeddings to true in config.json if it "
            "shares the embedding"
        )
    if f"{name}_scale_inv" in headers or name.removesuffix("weight") + "qweight" in headers:
        return "the weights are quantised; give the model in BF16 or F32"
    return "its config.json describes another model"


def _why_unexpected(name: str) -> str:
    if name.endswith(_OF_QUANTISED):
        return "the weights are quantised; give the model in BF16 or F32"
    return "its config.json describes another model"


def _begin_alike(head: TensorHeader, embedding: TensorHeader) -> bool:
    """False when shapes or first numbers differ; tensors of two dtypes are not compared."""
    if head.shape != embedding.shape:
        return False
    return head.dtype != embedding.dtype or _first_bytes(head) == _first_bytes(embedding)


def _first_bytes(header: TensorHeader) -> bytes:
    count = 2 if header.dtype in ("F16", "BF16") else 4
    for size in header.shape:
        count *= size
    with header.path.open("rb") as file:
        file.seek(header.offset)
        return file.read(min(count, _COMPARED))
