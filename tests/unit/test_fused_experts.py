"""Experts that transformers stored together are read as those that it stored one by one."""

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_opd.architectures.architecture import read_architecture
from megatron_opd.errors import DataError
from megatron_opd.weights.check import check_weights
from megatron_opd.weights.hf import HfCheckpoint


def write(directory: Path, *, fused: bool, **settings: object) -> Path:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=48,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=5,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(directory, save_original_format=not fused, **settings)
    return directory


@pytest.mark.parametrize("shard", ["50GB", "6KB"], ids=["one file", "shards"])
def test_every_expert_has_its_bits(shard: str, tmp_path: Path) -> None:
    single = HfCheckpoint(write(tmp_path / "single", fused=False))
    fused = HfCheckpoint(write(tmp_path / "fused", fused=True, max_shard_size=shard))
    assert (len(list((tmp_path / "fused").glob("*.safetensors"))) > 1) == (shard == "6KB")
    assert fused.shapes == single.shapes and fused.dtypes == single.dtypes
    assert any(".experts.4.up_proj.weight" in name for name in fused.shapes)
    for name in single.shapes:
        assert torch.equal(fused.read(name), single.read(name)), name
    check_weights(tmp_path / "fused", read_architecture(tmp_path / "fused"), sampled=True)


def turned(tensor_EIH: torch.Tensor) -> torch.Tensor:
    return tensor_EIH.transpose(1, 2).contiguous()


BROKEN = {
    "another layout": (turned, r"experts\.0\.gate_proj\.weight has shape \(16, 16\)"),
    "an expert less": (
        lambda stack: stack[:-1].clone(),
        r"experts\.4\.gate_proj\.weight is missing",
    ),
    "no stack": (lambda stack: stack[0].clone(), r"experts\.0\.gate_proj\.weight is missing"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_no_stack_of_experts_is_one_line(kind: str, tmp_path: Path) -> None:
    directory = write(tmp_path, fused=True)
    change, line = BROKEN[kind]
    tensors = load_file(directory / "model.safetensors")
    name = "model.layers.1.mlp.experts.gate_up_proj"
    save_file(tensors | {name: change(tensors[name])}, directory / "model.safetensors")
    with pytest.raises(DataError, match=line):
        check_weights(directory, read_architecture(directory))
