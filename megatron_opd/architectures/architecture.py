"""The architecture in a Hugging Face `config.json`, in one spelling. Imports no torch."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_opd.architectures.config import ModelConfig
from megatron_opd.architectures.config_keys import refuse_what_is_not_computed
from megatron_opd.architectures.rope import (
    RopeScaling,
    read_rope,
    rope_parameters,
    yarn_attention_factor,
)
from megatron_opd.contracts.ranges import PositiveFloat
from megatron_opd.errors import DataError
from megatron_opd.files.json_file import Size, read_json, read_key


@dataclass(frozen=True)
class Experts:
    """The mixture of experts in the place of every layer's MLP."""

    count: int
    per_token: int
    intermediate_size: int  # of one expert
    normalise_top: bool  # whether the weights of a token's experts add up to 1


@dataclass(frozen=True)
class Architecture:
    """Sizes and switches of a decoder-only model.

    `mcore.model.build` and the weight table are made from it.
    """

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
    "mistral": (False, False),
}


def read_architecture(model_dir: str | Path) -> Architecture:
    """Reads `model_dir/config.json`.

    Raises DataError naming the file when it is missing, malformed or unsupported.
    """
    return parse_architecture(read_config(model_dir), Path(model_dir) / "config.json")


def read_config(model_dir: str | Path) -> dict[str, Any]:
    """The content of `model_dir/config.json`.

    Raises DataError naming the file when it is missing or malformed.
    """
    path = Path(model_dir) / "config.json"
    if not Path(model_dir).is_dir():
        raise DataError(f"{model_dir}: no such model directory; {_remedy(Path(model_dir))}")
    try:
        return read_json(path)
    except FileNotFoundError:
        if (Path(model_dir) / "adapter_config.json").is_file():
            raise DataError(
                f"{path}: missing; {model_dir} holds a LoRA adapter, merge it with its base"
            ) from None
        raise DataError(
            f"{path}: missing; {model_dir} is not a Hugging Face model directory"
        ) from None


def _remedy(missing: Path) -> str:
    """The user's way to a directory that a recipe names and this machine lacks."""
    if (
        missing.parts[:1] == ("runs",)
        and len(missing.parts) > 1
        and missing.parts[1].startswith("demo")
    ):
        folder = missing.parts[1]
        command = "make demo"
        if folder.startswith("demo_real"):
            command = "make demo-real"
        elif folder.startswith("demo_moe"):
            command = "python tools/demo.py --moe"
        return f"make it with: {command}"
    return (
        "give the directory that holds config.json, or download it there: "
        f"hf download ORGANISATION/{missing.name} --local-dir {missing}"
    )


def architecture_of(model: ModelConfig) -> Architecture:
    """The architecture of a model's directory, with the recipe's changes. Raises DataError."""
    return changed(read_architecture(model.path), model)


def changed(arch: Architecture, model: ModelConfig) -> Architecture:
    """`arch` with the values that the recipe sets in `model`."""
    changes = {
        name: getattr(model, name) for name in CHANGEABLE if getattr(model, name) is not None
    }
    return replace(arch, **changes)


def config_changes(model_dir: str | Path, arch: Architecture) -> dict[str, Any]:
    """The keys of `model_dir/config.json` that must change for it to describe `arch`.

    Rotary embeddings have two spellings, and readers that know both prefer one or the other: all
    that are there change.
    """
    source = read_architecture(model_dir)
    changes: dict[str, Any] = {}
    if source.max_position_embeddings != arch.max_position_embeddings:
        changes["max_position_embeddings"] = arch.max_position_embeddings
    # A scaling without a length of its own reads the longest sequence, which has just changed.
    if source.rope_theta != arch.rope_theta or (arch.rope_scaling and changes):
        changes["rope_theta"] = arch.rope_theta
        changes["rope_parameters"] = rope_parameters(arch.rope_theta, arch.rope_scaling)
        if read_config(model_dir).get("rope_scaling"):
            changes["rope_scaling"] = changes["rope_parameters"]
    return changes


def engine_changes(model: ModelConfig) -> dict[str, Any]:
    """The keys that vLLM must read with other values than the directory's config.json has.

    For YaRN, vLLM reads `attn_factor`, which multiplies the usual factor, not `attention_factor`.
    """
    arch = architecture_of(model)
    changes = config_changes(model.path, arch)
    scaling = arch.rope_scaling
    if scaling and scaling.rope_type == "yarn":
        attn_factor = scaling.attention_factor / yarn_attention_factor(scaling.factor)
        changes["rope_parameters"] = rope_parameters(arch.rope_theta, scaling) | {
            "attn_factor": attn_factor
        }
    return changes


def parse_architecture(config: dict[str, Any], path: Path) -> Architecture:
    """The architecture that a `config.json` describes. Raises DataError naming `path`."""
    model_type = read_key(config, "model_type", str, path)
    if model_type not in SUPPORTED:
        raise DataError(
            f"{path}: model_type {model_type!r} is not supported; supported: {', '.join(SUPPORTED)}"
        )
    qkv_bias, qk_norm = SUPPORTED[model_type]
    if read_key(config, "attention_bias", bool | None, path, None) not in (None, qkv_bias):
        raise DataError(
            f"{path}: attention_bias={config['attention_bias']} is not supported for {model_type}"
        )
    if config.get("use_sliding_window"):
        raise DataError(f"{path}: use_sliding_window=true is not supported; set it to false")
    if config.get("mlp_bias"):
        raise DataError(f"{path}: mlp_bias=true is not supported")
    if config.get("hidden_act", "silu") != "silu":
        raise DataError(
            f"{path}: hidden_act={config['hidden_act']!r} is not supported; supported: silu"
        )
    refuse_what_is_not_computed(config, path)
    heads, groups, head_dim = _attention_sizes(config, path)
    max_position_embeddings = read_key(config, "max_position_embeddings", Size, path)
    rope_theta, rope_scaling = read_rope(config, path)
    return Architecture(
        model_type=model_type,
        vocab_size=read_key(config, "vocab_size", Size, path),
        hidden_size=read_key(config, "hidden_size", Size, path),
        num_layers=read_key(config, "num_hidden_layers", Size, path),
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=head_dim,
        intermediate_size=read_key(config, "intermediate_size", Size, path),
        max_position_embeddings=max_position_embeddings,
        rms_norm_eps=read_key(config, "rms_norm_eps", PositiveFloat, path, 1e-6),
        rope_theta=rope_theta,
        tie_word_embeddings=read_key(config, "tie_word_embeddings", bool, path, False),
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        experts=_experts(config, path) if model_type.endswith("_moe") else None,
        rope_scaling=rope_scaling,
    )


def _attention_sizes(config: dict[str, Any], path: Path) -> tuple[int, int, int]:
    """Attention heads, key-value heads, and the size of a head."""
    heads = read_key(config, "num_attention_heads", Size, path)
    groups = read_key(config, "num_key_value_heads", Size | None, path, None) or heads
    if heads % groups:
        raise DataError(
            f"{path}: num_key_value_heads: {groups} does not divide num_attention_heads={heads}"
        )
    head_dim = read_key(config, "head_dim", Size | None, path, None)
    hidden_size = read_key(config, "hidden_size", Size, path)
    if head_dim is None and hidden_size % heads:
        raise DataError(
            f"{path}: num_attention_heads: {heads} does not divide hidden_size={hidden_size}"
        )
    head_dim = head_dim or hidden_size // heads
    if head_dim % 2:
        raise DataError(
            f"{path}: head_dim: {head_dim} is odd, and rotary embeddings turn pairs of numbers"
        )
    return heads, groups, head_dim


def _experts(config: dict[str, Any], path: Path) -> Experts:
    if config.get("decoder_sparse_step", 1) != 1 or config.get("mlp_only_layers"):
        raise DataError(
            f"{path}: layers without experts among those with (decoder_sparse_step, "
            "mlp_only_layers) are not supported"
        )
    count_key = "num_experts" if "num_experts" in config else "num_local_experts"
    count = read_key(config, count_key, Size, path)
    per_token = read_key(config, "num_experts_per_tok", Size, path)
    if per_token > count:
        raise DataError(
            f"{path}: num_experts_per_tok: {per_token} is more than the {count} experts"
        )
    return Experts(
        count=count,
        per_token=per_token,
        intermediate_size=read_key(config, "moe_intermediate_size", Size, path),
        normalise_top=read_key(config, "norm_topk_prob", bool, path, False),
    )
