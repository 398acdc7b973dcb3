"""config.json files: those of the models people use pass, and what is wrong with one is a line that
names the key."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import transformers

from megatron_opd.architectures.architecture import read_architecture
from megatron_opd.architectures.config_keys import REFUSED, unknown_keys
from megatron_opd.cli.main import main
from megatron_opd.errors import DataError
from tests.unit.tiny_model_files import write_model, write_recipe

DENSE = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 1536,
    "initializer_range": 0.02,
    "intermediate_size": 8960,
    "max_position_embeddings": 32768,
    "model_type": "qwen2",
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "vocab_size": 151936,
}
QWEN2 = DENSE | {"max_window_layers": 21, "sliding_window": 32768, "use_sliding_window": False}
LLAMA3 = DENSE | {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "mlp_bias": False,
    "eos_token_id": [128001, 128008, 128009],
    "model_type": "llama",
    "pretraining_tp": 1,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-05,
    "vocab_size": 128256,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}
QWEN3 = QWEN2 | {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "rope_scaling": None,
    "sliding_window": None,
}
MISTRAL = DENSE | {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "model_type": "mistral",
    "rms_norm_eps": 1e-05,
    "sliding_window": None,
}
# The keys of each model's own file, as its authors wrote them; sizes are of no interest here.
REAL: dict[str, dict[str, Any]] = {
    "Qwen2-1.5B": QWEN2,
    "Qwen2.5-1.5B-Instruct": QWEN2,
    "Qwen2.5-Math-7B": QWEN2
    | {"max_position_embeddings": 4096, "rope_theta": 10000, "use_mrope": False},
    "Qwen2.5-7B with YaRN": QWEN2
    | {"rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}},
    "Qwen3-1.7B": QWEN3,
    "Qwen3-30B-A3B": QWEN3
    | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    },
    "Llama-3.1-8B": LLAMA3,
    "Llama-3.2-1B": LLAMA3 | {"head_dim": 64, "hidden_size": 768},
    "Llama-3-8B": LLAMA3 | {"rope_scaling": None},
    "Llama-3.3-70B-Instruct": LLAMA3 | {"head_dim": 128},
    "Mistral-7B-Instruct-v0.3": MISTRAL,
    "Mistral-Nemo-Instruct-2407": MISTRAL | {"head_dim": 128, "rope_theta": 1000000.0},
    "R1-Distill-Qwen-1.5B": QWEN2
    | {"use_mrope": False, "sliding_window": 4096, "rope_theta": 10000},
    "R1-Distill-Llama-8B": LLAMA3 | {"_name_or_path": "x"},
    "SmolLM2-135M-Instruct": DENSE
    | {
        "_name_or_path": "x",
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "is_llama_config": True,
        "mlp_bias": False,
        "model_type": "llama",
        "pad_token_id": 2,
        "pretraining_tp": 1,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 100000,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    },
    "saved by Unsloth": QWEN2
    | {"unsloth_fixed": True, "unsloth_version": "2025.3", "layer_types": ["full_attention"]},
    "saved by TRL": QWEN2 | {"_attn_implementation_autoset": True, "dtype": "bfloat16"},
}


def write(directory: Path, config: object) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(
        config if isinstance(config, str) else json.dumps(config)
    )
    return directory


@pytest.mark.parametrize("name", REAL)
def test_the_files_of_real_models_pass_without_a_warning(name: str, tmp_path: Path) -> None:
    read_architecture(write(tmp_path / "model", REAL[name]))
    assert unknown_keys(REAL[name]) == []


@pytest.mark.parametrize("kind", ["Qwen2", "Qwen3", "Qwen3Moe", "Llama"])
def test_what_transformers_writes_passes_without_a_warning(kind: str, tmp_path: Path) -> None:
    config = getattr(transformers, f"{kind}Config")()
    config.save_pretrained(tmp_path)
    read_architecture(tmp_path)
    every_key = config.to_dict() | json.loads((tmp_path / "config.json").read_text())
    assert unknown_keys(every_key) == []
    read_architecture(write(tmp_path, every_key))


# ------------------------------------------------------------------------------------- wrong values
SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
)
NO_SIZES = (None, "16", [16], {}, -1, 0, 1.5, True, float("nan"), float("inf"), 10**30)
EXPERTS = {
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
}
WRONG: list[tuple[str, dict[str, Any]]] = [
    *((key, {key: value}) for key in SIZES for value in NO_SIZES),
    *(
        ("num_key_value_heads", {"num_key_value_heads": value})
        for value in ("2", [2], -2, 1.5, True, 0, 3)
    ),
    *(("head_dim", {"head_dim": value}) for value in ("4", [4], -4, 1.5, True, 0, 3)),
    *(
        ("rms_norm_eps", {"rms_norm_eps": value})
        for value in (None, "1e-6", -1e-6, 0, float("nan"), [], True)
    ),
    *(
        ("rope_theta", {"rope_theta": value})
        for value in (None, "1e4", 0, -1, float("inf"), [1], {}, True)
    ),
    *(
        ("rope_theta", {"rope_parameters": {"rope_theta": value}})
        for value in (None, "1e4", 0, float("nan"))
    ),
    *(("rope_scaling", {"rope_scaling": value}) for value in ("yarn", [1], 4, True)),
    *(("rope_parameters", {"rope_parameters": value}) for value in ("yarn", [1], 4, True)),
    ("full_attention", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}),
    ("mrope_section", {"rope_scaling": {"rope_type": "default", "mrope_section": [16, 24, 24]}}),
    ("RoPE type ['yarn']", {"rope_scaling": {"rope_type": ["yarn"]}}),
    ("factor", {"rope_scaling": {"rope_type": "linear", "factor": True}}),
    ("truncate", {"rope_scaling": {"rope_type": "yarn", "factor": 2, "truncate": "no"}}),
    *(("tie_word_embeddings", {"tie_word_embeddings": value}) for value in ("false", 0, [], None)),
    *(("attention_bias", {"attention_bias": value}) for value in ("false", 1, [])),
    *(
        ("model_type", {"model_type": value})
        for value in (None, ["qwen3"], {}, 3, "Qwen3", "qwen2_vl", "mamba")
    ),
    ("hidden_act", {"hidden_act": ["silu"]}),
    (
        "num_attention_heads: 3 does not divide hidden_size=16",
        {"num_attention_heads": 3, "num_key_value_heads": 3},
    ),
    *((key, EXPERTS | {key: value}) for key in list(EXPERTS)[1:] for value in (None, "4", 0, [4])),
    ("num_experts_per_tok: 5 is more than the 4 experts", EXPERTS | {"num_experts_per_tok": 5}),
    ("norm_topk_prob", EXPERTS | {"norm_topk_prob": "yes"}),
    ("decoder_sparse_step", EXPERTS | {"decoder_sparse_step": 2}),
    *((key, {key: {"a": 1}}) for key in REFUSED),
    ("sliding_window=4096", {"model_type": "mistral"}),  # transformers' default
    *(("sliding_window", MISTRAL | {"sliding_window": value}) for value in (0, 4096, "none")),
    ("is_causal=false", {"is_causal": False}),
    ("sliding_attention", {"layer_types": ["full_attention", "sliding_attention"]}),
    ("layer_types", {"layer_types": "sliding_attention"}),
    ("layer_types", {"layer_types": [["full_attention"]]}),
    ("use_sliding_window=true", {"use_sliding_window": True}),
]
NO_OBJECT = {
    "a list": "[1]",
    "a text": '"qwen2"',
    "null": "null",
    "a number": "7",
    "nothing": "",
    "blanks": " \n",
    "half": '{"a"',
    "Python": "{'model_type': 'qwen2'}",
    "a byte order mark": "\ufeff{}",
    "deep": "[" * 100_000,
    "digits": "9" * 5000,
}


def sizes() -> dict[str, Any]:
    return {"model_type": "qwen3", "vocab_size": 16, "hidden_size": 16, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32,
            "max_position_embeddings": 64}  # fmt: skip


@pytest.mark.parametrize(
    ("named", "keys"), WRONG, ids=[f"{i}-{named}" for i, (named, _) in enumerate(WRONG)]
)
def test_a_wrong_value_is_one_line_that_names_file_and_key(
    named: str, keys: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=re.escape(named)) as error:
        read_architecture(write(tmp_path, sizes() | keys))
    assert str(error.value).startswith(f"{tmp_path / 'config.json'}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", NO_OBJECT.values(), ids=list(NO_OBJECT))
def test_what_is_no_json_object_is_one_line(text: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"config\.json: (not valid JSON|must be a JSON object)"):
        read_architecture(write(tmp_path, text))


def test_files_that_are_no_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(DataError, match=r"config\.json: cannot be read \(Is a directory\)"):
        read_architecture(tmp_path)
    (tmp_path / "config.json").rmdir()
    (tmp_path / "config.json").write_bytes(b'{"model_type": "\xff"}')
    with pytest.raises(DataError, match=r"config\.json: not valid JSON"):
        read_architecture(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(DataError, match="holds a LoRA adapter"):
        read_architecture(tmp_path)


def test_a_key_of_which_nothing_is_known_is_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(tmp_path / "student", attention_of_tomorrow={"window": 8}, new_and_off=False)
    assert main(["check", str(write_recipe(tmp_path))]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        "student.path" in line
        and "config.json has attention_of_tomorrow, which nothing here reads" in line
    )


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", [1]),
        ("tokenizer.json", {"model": 1}),
        ("tokenizer.json", {"model": {"vocab": [1]}}),
        ("tokenizer.json", {"model": {"vocab": {"a": "0"}}}),
        ("tokenizer.json", {"model": {"vocab": {"a": None}}}),
        ("tokenizer.json", {"model": {"vocab": {}}, "added_tokens": [{"id": 1}]}),
        ("tokenizer.json", {"model": {"vocab": {}}, "added_tokens": 7}),
        ("generation_config.json", [1]),
        ("generation_config.json", {"eos_token_id": "1"}),
        ("generation_config.json", {"eos_token_id": [[1]]}),
        ("generation_config.json", {"eos_token_id": {"a": 1}}),
    ],
)
def test_the_files_beside_config_json_are_named_too(
    file: str, content: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path)
    (tmp_path / "student" / file).write_text(json.dumps(content))
    assert main(["check", str(recipe)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"megatron-opd: error: {tmp_path / 'student' / file}: ")
