"""What config.json says of a model: both spellings of RoPE, the models that are read, and those
that are refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_opd.architectures.architecture import (
    architecture_of,
    config_changes,
    engine_changes,
    read_architecture,
)
from megatron_opd.architectures.config import ModelConfig
from megatron_opd.architectures.rope import RopeScaling, read_rope, yarn_attention_factor
from megatron_opd.errors import DataError
from megatron_opd.mcore.rope import scaled_frequencies

SIZES = {
    "vocab_size": 16,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 131072,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32768}
SCALINGS = {
    "linear": ({"factor": 2.5}, RopeScaling("linear", 2.5)),
    "llama3": (LLAMA3, RopeScaling("llama3", 8.0, 8192, 1.0, 4.0)),
    "yarn": (YARN, RopeScaling("yarn", 4.0, 32768, attention_factor=yarn_attention_factor(4.0))),
}


def write(directory: Path, model_type: str = "llama", **keys: Any) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(SIZES | {"model_type": model_type} | keys))
    return directory


def spelled(rope_type: str, spelling: str) -> dict[str, Any]:
    values, theta = SCALINGS[rope_type][0], 5e5
    if spelling == "rope_parameters":
        return {spelling: values | {"rope_type": rope_type, "rope_theta": theta}}
    return {"rope_theta": theta, "rope_scaling": values | {spelling: rope_type}}


# --------------------------------------------------------------------------------------------- RoPE
# transformers 4 (old, new) and 5
@pytest.mark.parametrize("spelling", ["type", "rope_type", "rope_parameters"])
@pytest.mark.parametrize("rope_type", SCALINGS)
def test_scaling_is_read_in_every_spelling(rope_type: str, spelling: str, tmp_path: Path) -> None:
    arch = read_architecture(write(tmp_path, **spelled(rope_type, spelling)))
    assert (arch.rope_theta, arch.rope_scaling) == (5e5, SCALINGS[rope_type][1])


@pytest.mark.parametrize("spelling", ["type", "rope_type", "rope_parameters"])
@pytest.mark.parametrize("rope_type", SCALINGS)
def test_a_recipes_changes_reach_every_reader(
    rope_type: str, spelling: str, tmp_path: Path
) -> None:
    """Written into config.json they are read by us, and by transformers, as the recipe says; the
    scaling stays."""
    rope = spelled(rope_type, spelling)
    directory = write(tmp_path, **rope)
    assert config_changes(directory, read_architecture(directory)) == {}
    changed = architecture_of(
        ModelConfig(str(directory), rope_theta=3e5, max_position_embeddings=200_000)
    )
    assert changed.rope_scaling == SCALINGS[rope_type][1]
    write(directory, **(rope | config_changes(directory, changed)))
    assert read_architecture(directory) == changed
    theirs = transformers.AutoConfig.from_pretrained(directory)
    assert (theirs.rope_parameters["rope_theta"], theirs.rope_parameters["rope_type"]) == (
        3e5,
        rope_type,
    )
    assert read_rope(theirs.to_dict(), directory) == (3e5, changed.rope_scaling)


def test_a_longer_context_does_not_move_the_original_one(tmp_path: Path) -> None:
    """transformers takes `max_position_embeddings` where the scaling names no original context."""
    rope = {"rope_scaling": {"type": "yarn", "factor": 2.0}}
    directory = write(tmp_path, **rope)
    changed = architecture_of(ModelConfig(str(directory), max_position_embeddings=262144))
    assert changed.rope_scaling and changed.rope_scaling.original_max_position_embeddings == 131072
    write(directory, **(rope | config_changes(directory, changed)))
    assert read_architecture(directory) == changed


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    ("rope_type", "keys"),
    [
        ("linear", {"factor": 4.0}),
        ("llama3", LLAMA3),
        ("yarn", YARN),
        ("yarn", {"factor": 4.0, "attention_factor": 1.3, "beta_fast": None}),
        ("yarn", {"factor": 40.0, "mscale": 0.7, "mscale_all_dim": 0.4, "beta_fast": 20,
                  "beta_slow": 2, "truncate": False, "original_max_position_embeddings": 4096}),
    ],
)  # fmt: skip
def test_frequencies_and_attention_factor_are_transformers(
    rope_type: str, keys: dict, head_dim: int
) -> None:
    rope = {"rope_type": rope_type, "rope_theta": 5e5} | keys
    config = transformers.LlamaConfig(
        head_dim=head_dim, max_position_embeddings=131072, rope_parameters=rope
    )
    expected_F, attention_factor = ROPE_INIT_FUNCTIONS[rope_type](config, "cpu")
    theta, scaling = read_rope(config.to_dict(), Path("config.json"))
    assert scaling and scaling.attention_factor == pytest.approx(attention_factor, rel=1e-12)
    plain_F = 1.0 / theta ** (torch.arange(0, head_dim, 2) / head_dim)
    torch.testing.assert_close(
        scaled_frequencies(plain_F, theta, scaling), expected_F, rtol=2e-7, atol=0
    )


def test_vllm_is_told_yarns_attention_factor_in_its_own_key(tmp_path: Path) -> None:
    given = {"rope_type": "yarn", "rope_theta": 1e4, "attention_factor": 1.5} | YARN
    model = ModelConfig(str(write(tmp_path, rope_parameters=given)))
    told = engine_changes(model)["rope_parameters"]
    assert told["attn_factor"] * yarn_attention_factor(4.0) == pytest.approx(1.5)
    assert told["original_max_position_embeddings"] == 32768
    write(tmp_path, rope_parameters={"rope_type": "llama3", "rope_theta": 1e4} | LLAMA3)
    assert engine_changes(model) == {}


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "RoPE type 'dynamic' is not supported; supported: def",
        ),
        ({"rope_parameters": {"rope_type": "longrope"}}, "RoPE type 'longrope' is not supported"),
        ({"rope_scaling": {"type": "yarn"}}, "RoPE type 'yarn' needs the key 'factor'"),
        (
            {"rope_scaling": LLAMA3 | {"type": "llama3", "factor": "8"}},
            "RoPE type 'llama3': factor='8' must be a num",
        ),
        (
            {"rope_scaling": LLAMA3 | {"type": "llama3", "factor": None}},
            "RoPE type 'llama3' needs the key 'factor'",
        ),
        (
            {"rope_scaling": LLAMA3 | {"type": "llama3", "high_freq_factor": 1.0}},
            "high_freq_factor must be above low",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 0}},
            "RoPE type 'linear': factor=0 must be a number above 0",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not supported"),
        ({"attention_bias": True}, "attention_bias=True is not supported for llama"),
        ({"mlp_bias": True}, "mlp_bias=true is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        (
            {"model_type": "mamba"},
            "model_type 'mamba' is not supported; supported: qwen2, qwen3, qwen3_moe, "
            "llama, mistral",
        ),
    ],
)
def test_what_is_not_supported_is_one_line_that_names_it(
    keys: dict, problem: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError) as error:
        read_architecture(write(tmp_path, **keys))
    assert problem in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).startswith(str(tmp_path / "config.json"))


# ------------------------------------------------------------------------------------------- models
def test_the_distilled_r1_models(tmp_path: Path) -> None:
    """As their config.json files spell themselves, with smaller sizes."""
    qwen = write(
        tmp_path / "qwen",
        "qwen2",
        hidden_act="silu",
        rms_norm_eps=1e-6,
        rope_theta=10000,
        sliding_window=4096,
        tie_word_embeddings=False,
        use_mrope=False,
        use_sliding_window=False,
    )
    llama = write(
        tmp_path / "llama",
        attention_bias=False,
        mlp_bias=False,
        pretraining_tp=1,
        rms_norm_eps=1e-5,
        rope_theta=5e5,
        rope_scaling=LLAMA3 | {"rope_type": "llama3"},
        tie_word_embeddings=False,
    )
    first, second = read_architecture(qwen), read_architecture(llama)
    assert (first.qkv_bias, first.qk_norm, first.head_dim, first.tie_word_embeddings) == (
        True,
        False,
        4,
        False,
    )
    assert first.rope_scaling is None
    differences = {
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        "rope_scaling": SCALINGS["llama3"][1],
        "qkv_bias": False,
    }
    assert second == replace(first, model_type="llama", **differences)
