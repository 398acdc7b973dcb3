"""Which layers a model is made of, and that the weight table knows Transformer Engine's names.

Transformer Engine itself has not run here: its names are put upon the parameters of a real model of
local layers.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.transformer.identity_op import IdentityOp
from safetensors.torch import save_file

from megatron_opd.architectures.architecture import Architecture, Experts
from megatron_opd.architectures.config import LayoutConfig
from megatron_opd.mcore import parallel as groups
from megatron_opd.mcore import specs
from megatron_opd.mcore.model import build_model
from megatron_opd.weights.export import iter_hf_tensors
from megatron_opd.weights.load import load_hf
from megatron_opd.weights.table import hf_shapes, weight_table
from megatron_opd.world import processes

DENSE = Architecture(
    model_type="qwen3",
    vocab_size=11,
    hidden_size=16,
    num_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    intermediate_size=24,
    max_position_embeddings=64,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    tie_word_embeddings=False,
    qkv_bias=True,
    qk_norm=True,
)
MOE = replace(DENSE, model_type="qwen3_moe", experts=Experts(4, 2, 24, True))


@pytest.fixture(scope="module")
def parallel() -> Iterator[groups.Parallel]:
    processes.start()
    yield groups.create(LayoutConfig())
    processes.stop()


@pytest.mark.parametrize(
    ("installed", "device", "chosen"),
    [(True, "cuda", True), (True, "cpu", False), (False, "cuda", False)],
)
def test_transformer_engine_is_used_where_it_runs(
    monkeypatch: pytest.MonkeyPatch, installed: bool, device: str, chosen: bool
) -> None:
    monkeypatch.setattr(specs, "HAVE_TE", installed)
    assert specs.uses_transformer_engine(torch.device(device)) is chosen


@pytest.mark.parametrize("arch", [DENSE, MOE], ids=["dense", "experts"])
def test_weights_go_in_and_out_under_transformer_engines_names(
    parallel: groups.Parallel, arch: Architecture, tmp_path: Path
) -> None:
    tensors = {name: torch.randn(shape) for name, shape in hf_shapes(weight_table(arch)).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    chunks = build_model(arch, parallel, precision="float32")
    rename_as_transformer_engine(chunks[0])
    for parameter in chunks[0].parameters():
        torch.nn.init.constant_(parameter, torch.nan)  # one that is left shows
    load_hf(chunks, tmp_path, arch, parallel)
    assert not any(parameter.isnan().any() for parameter in chunks[0].parameters())
    exported = dict(iter_hf_tensors(chunks, arch, parallel))
    assert exported.keys() == tensors.keys()
    assert all(torch.equal(exported[name], tensors[name]) for name in tensors)


def rename_as_transformer_engine(model: Any) -> None:
    """Source of the names: megatron-core 0.19 with Transformer Engine's layer spec."""
    for layer in model.decoder.layers:
        move(layer, "input_layernorm", layer.self_attention.linear_qkv)
        if layer.is_moe_layer:
            for linear in layer.mlp.experts.children():
                for i, weight in enumerate(linear._parameters.pop("weight").detach()):
                    linear.register_parameter(f"weight{i}", torch.nn.Parameter(weight.clone()))
        else:
            move(layer, "pre_mlp_layernorm", layer.mlp.linear_fc1)
    names = dict(model.named_parameters())
    assert "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight" in names
    expected = (
        "experts.linear_fc2.weight3" if layer.is_moe_layer else "linear_fc1.layer_norm_weight"
    )
    assert f"decoder.layers.1.mlp.{expected}" in names
    assert ("decoder.layers.1.pre_mlp_layernorm.weight" in names) == layer.is_moe_layer


def move(layer: Any, norm: str, linear: torch.nn.Module) -> None:
    linear.register_parameter("layer_norm_weight", getattr(layer, norm).weight)
    setattr(layer, norm, IdentityOp())
