"""What a Hugging Face `config.json` says of a model, in one spelling. Imports no torch.

Both spellings of RoPE are read: `rope_theta`/`rope_scaling` (transformers 4) and `rope_parameters` (transformers 5).
"""

import json
from dataclasses import dataclass
from pathlib import Path

from megatron_opd.errors import DataError


@dataclass(frozen=True)
class Architecture:
    """Sizes and switches of a decoder-only model; the input of `mcore.model.build` and of the weight table."""

    model_type: str  # "qwen2" | "qwen3"
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    qkv_bias: bool
    qk_norm: bool


# model_type -> (qkv_bias, qk_norm). The table later architectures extend.
SUPPORTED: dict[str, tuple[bool, bool]] = {"qwen2": (True, False), "qwen3": (False, True)}


def read_architecture(model_dir: str | Path) -> Architecture:
    """Reads `model_dir/config.json`. Raises DataError naming the file when it is missing, malformed or unsupported."""
    path = Path(model_dir) / "config.json"
    if not Path(model_dir).is_dir():
        raise DataError(f"{model_dir}: no such model directory; give the directory that holds config.json")
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise DataError(f"{path}: missing; {model_dir} is not a Hugging Face model directory") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not valid JSON ({error})") from None
    try:
        return _parse(config, path)
    except KeyError as error:
        raise DataError(f"{path}: key {error} is missing") from None


def _parse(config: dict, path: Path) -> Architecture:
    model_type = config["model_type"]
    if model_type not in SUPPORTED:
        raise DataError(f"{path}: model_type {model_type!r} is not supported; supported: {', '.join(SUPPORTED)}")
    qkv_bias, qk_norm = SUPPORTED[model_type]
    if config.get("attention_bias", qkv_bias) != qkv_bias:
        raise DataError(f"{path}: attention_bias={config['attention_bias']} is not supported for {model_type}")
    if config.get("use_sliding_window"):
        raise DataError(f"{path}: use_sliding_window=true is not supported; set it to false")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        raise DataError(f"{path}: RoPE type {rope_type!r} is not supported; supported: default")
    heads = config["num_attention_heads"]
    return Architecture(
        model_type=model_type,
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=config.get("num_key_value_heads", heads),
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        intermediate_size=config["intermediate_size"],
        max_position_embeddings=config["max_position_embeddings"],
        rms_norm_eps=config.get("rms_norm_eps", 1e-6),
        rope_theta=float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
        tie_word_embeddings=config.get("tie_word_embeddings", False),
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
    )
