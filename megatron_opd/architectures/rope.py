"""Rotary position embeddings (RoPE) in a Hugging Face `config.json`, in one spelling.

Imports no torch. transformers 4 writes `rope_theta` and `rope_scaling`, transformers 5
`rope_parameters`. Where a file has both, `rope_scaling` counts, as in transformers 5.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_opd.contracts.ranges import PositiveFloat
from megatron_opd.errors import DataError
from megatron_opd.files.json_file import read_key


@dataclass(frozen=True)
class RopeScaling:
    """The stretch of frequencies over more positions than the model was first trained on.

    Names, defaults and meanings are those of transformers; KEYS lists the fields that a type reads.
    """

    rope_type: str  # "linear" | "llama3" | "yarn"
    factor: float
    original_max_position_embeddings: int = 0  # the context of the first training, tokens
    low_freq_factor: float = 0.0
    high_freq_factor: float = 0.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0  # cosine and sine are multiplied by it


KEYS = {
    "linear": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "truncate",
        "attention_factor",
    ),
}
OPTIONAL = {"beta_fast", "beta_slow", "truncate"}
_KNOWN = {
    "rope_type",
    "type",
    "rope_theta",
    "partial_rotary_factor",
    "mscale",
    "mscale_all_dim",
    "attn_factor",
    *(key for keys in KEYS.values() for key in keys),
}


def read_rope(config: dict[str, Any], path: Path) -> tuple[float, RopeScaling | None]:
    """Base and scaling from `config`, the content of `path`. Raises DataError naming the key."""
    rope = _rope_mapping(config, path)
    theta = float(read_key(config | rope, "rope_theta", PositiveFloat, path, 10000.0))
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", *KEYS):
        raise DataError(
            f"{path}: RoPE type {rope_type!r} is not supported; supported: default, "
            f"{', '.join(KEYS)}"
        )
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor")) not in (None, 1):
        raise DataError(
            f"{path}: partial_rotary_factor is not supported; all of a head must rotate"
        )
    if rope_type == "default":
        return theta, None
    # transformers prefers the key beside the dictionary, and falls back to the longest sequence.
    original = rope.get("original_max_position_embeddings", config["max_position_embeddings"])
    rope = rope | {
        "original_max_position_embeddings": config.get("original_max_position_embeddings", original)
    }
    try:
        return theta, _scaling(rope_type, rope)
    except KeyError as error:
        raise DataError(f"{path}: RoPE type {rope_type!r} needs the key {error}") from None
    except ValueError as error:
        raise DataError(f"{path}: RoPE type {rope_type!r}: {error}") from None


def _rope_mapping(config: dict[str, Any], path: Path) -> dict[str, Any]:
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(key) or {}
    if not isinstance(rope, dict):
        raise DataError(f"{path}: {key}: must be a mapping of keys, got {rope!r}")
    for name, value in rope.items():
        if name not in _KNOWN and value not in (None, False):
            raise DataError(
                f"{path}: {key}: {name} is not supported; supported: {', '.join(sorted(_KNOWN))}"
            )
    return rope


def _scaling(rope_type: str, rope: dict[str, Any]) -> RopeScaling:
    rope = {key: value for key, value in rope.items() if value is not None}
    for key in (*KEYS[rope_type], "mscale", "mscale_all_dim"):
        if key != "truncate" and not _is_positive(rope.get(key, 1)):
            raise ValueError(f"{key}={rope[key]!r} must be a number above 0")
    if not isinstance(rope.get("truncate", True), bool):
        raise ValueError(f"truncate={rope['truncate']!r} must be true or false")
    if rope_type == "yarn":
        rope = {"attention_factor": _attention_factor(rope)} | rope
    keys = [key for key in KEYS[rope_type] if key not in OPTIONAL or key in rope]
    scaling = RopeScaling(rope_type, **{key: rope[key] for key in keys})
    if rope_type == "llama3" and scaling.high_freq_factor <= scaling.low_freq_factor:
        raise ValueError("high_freq_factor must be above low_freq_factor")
    return scaling


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _attention_factor(rope: dict[str, Any]) -> float:
    factor = rope["factor"]
    mscale = rope.get("mscale")
    mscale_all_dim = rope.get("mscale_all_dim")
    if mscale and mscale_all_dim:
        return yarn_attention_factor(factor, mscale) / yarn_attention_factor(factor, mscale_all_dim)
    return yarn_attention_factor(factor)


def yarn_attention_factor(factor: float, mscale: float = 1.0) -> float:
    """The factor of YaRN on cosine and sine, of query and key alike (arXiv 2309.00071, Eq. 22)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def rope_parameters(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """The key `rope_parameters` as transformers 5 writes it."""
    if scaling is None:
        return {"rope_type": "default", "rope_theta": theta}
    values = {key: getattr(scaling, key) for key in KEYS[scaling.rope_type]}
    return {"rope_type": scaling.rope_type, "rope_theta": theta} | values
