"""What a Hugging Face `config.json` says of a model, in one spelling. Imports no torch."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_opd.config.rope import RopeScaling, read_rope, rope_parameters, yarn_attention_factor
from megatron_opd.config.schema import ModelConfig
from megatron_opd.errors import DataError


@dataclass(frozen=True)
class Experts:
    """The mixture of experts in the place of every layer's MLP."""

    count: int
    per_token: int
    intermediate_size: int  # of one expert
    normalise_top: bool  # whether the weights of a token's experts add up to 1


@dataclass(frozen=True)
class Architecture:
    """Sizes and switches of a decoder-only model; the input of `mcore.model.build` and of the weight table."""

    model_type: str  # a key of SUPPORTED
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
    experts: Experts | None = None
    rope_scaling: RopeScaling | None = None


CHANGEABLE = ("rope_theta", "max_position_embeddings")  # by a recipe: keys of ModelConfig

# model_type -> (qkv_bias, qk_norm). The table later architectures extend.
SUPPORTED: dict[str, tuple[bool, bool]] = {
    "qwen2": (True, False),
    "qwen3": (False, True),
    "qwen3_moe": (False, True),
    "llama": (False, False),
}


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
    return parse_architecture(config, path)


def architecture_of(model: ModelConfig) -> Architecture:
    """That of the model's directory, with what the recipe changes. Raises DataError."""
    return changed(read_architecture(model.path), model)


def changed(arch: Architecture, model: ModelConfig) -> Architecture:
    """`arch` with what the recipe changes of it."""
    changes = {name: getattr(model, name) for name in CHANGEABLE if getattr(model, name) is not None}
    return replace(arch, **changes)


def config_changes(model_dir: str | Path, arch: Architecture) -> dict[str, Any]:
    """Keys of `model_dir/config.json` that must change for it to describe `arch`; {} where nothing differs.

    Rotary embeddings have two spellings, and readers that know both prefer one or the other: all that are there change.
    """
    source = read_architecture(model_dir)
    changes: dict[str, Any] = {}
    if source.max_position_embeddings != arch.max_position_embeddings:
        changes["max_position_embeddings"] = arch.max_position_embeddings
    # A scaling may take the longest sequence from beside it, which then must no longer say so.
    if source.rope_theta != arch.rope_theta or (arch.rope_scaling and changes):
        changes["rope_theta"] = arch.rope_theta
        changes["rope_parameters"] = rope_parameters(arch.rope_theta, arch.rope_scaling)
        if json.loads((Path(model_dir) / "config.json").read_text()).get("rope_scaling"):
            changes["rope_scaling"] = changes["rope_parameters"]
    return changes


def engine_changes(model: ModelConfig) -> dict[str, Any]:
    """What vLLM must read otherwise than the directory's config.json says it.

    Of YaRN it reads no `attention_factor`, but a factor of its own beside the usual one.
    """
    arch = architecture_of(model)
    changes, scaling = config_changes(model.path, arch), arch.rope_scaling
    if scaling and scaling.rope_type == "yarn":
        attn_factor = scaling.attention_factor / yarn_attention_factor(scaling.factor)
        changes["rope_parameters"] = rope_parameters(arch.rope_theta, scaling) | {"attn_factor": attn_factor}
    return changes


def parse_architecture(config: dict[str, Any], path: Path) -> Architecture:
    """The content of a `config.json`; `path` is named in errors. Raises DataError."""
    try:
        return _parse(config, path)
    except KeyError as error:
        raise DataError(f"{path}: key {error} is missing") from None


def _parse(config: dict[str, Any], path: Path) -> Architecture:
    model_type = config["model_type"]
    if model_type not in SUPPORTED:
        raise DataError(f"{path}: model_type {model_type!r} is not supported; supported: {', '.join(SUPPORTED)}")
    qkv_bias, qk_norm = SUPPORTED[model_type]
    if config.get("attention_bias", qkv_bias) != qkv_bias:
        raise DataError(f"{path}: attention_bias={config['attention_bias']} is not supported for {model_type}")
    if config.get("use_sliding_window"):
        raise DataError(f"{path}: use_sliding_window=true is not supported; set it to false")
    if config.get("mlp_bias"):
        raise DataError(f"{path}: mlp_bias=true is not supported")
    if config.get("hidden_act", "silu") != "silu":
        raise DataError(f"{path}: hidden_act={config['hidden_act']!r} is not supported; supported: silu")
    rope_theta, rope_scaling = read_rope(config, path)
    heads = config["num_attention_heads"]
    return Architecture(
        model_type=model_type,
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        intermediate_size=config["intermediate_size"],
        max_position_embeddings=config["max_position_embeddings"],
        rms_norm_eps=config.get("rms_norm_eps", 1e-6),
        rope_theta=rope_theta,
        tie_word_embeddings=config.get("tie_word_embeddings", False),
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        experts=_experts(config, path) if model_type.endswith("_moe") else None,
        rope_scaling=rope_scaling,
    )


def _experts(config: dict, path: Path) -> Experts:
    if config.get("decoder_sparse_step", 1) != 1 or config.get("mlp_only_layers"):
        raise DataError(f"{path}: layers without experts among those with (decoder_sparse_step, mlp_only_layers) "
                        "are not supported")  # fmt: skip
    return Experts(
        count=config["num_experts"] if "num_experts" in config else config["num_local_experts"],
        per_token=config["num_experts_per_tok"],
        intermediate_size=config["moe_intermediate_size"],
        normalise_top=config.get("norm_topk_prob", False),
    )
