"""Every layout gives transformers' logits from transformers' weights, and gives the weights back bit for bit."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
import transformers
from safetensors.torch import load_file

from megatron_opd.weights.hf import HfCheckpoint
from tests.distributed.weights_worker import tokens_BS

WORKER = Path(__file__).with_name("weights_worker.py")
VOCAB_SIZE = 131  # odd: tensor parallelism has to pad it
# name -> (model_type, tied, heads, key-value heads, layers)
MODELS = {
    "qwen2": ("qwen2", False, 4, 2, 2),
    "qwen2-tied": ("qwen2", True, 4, 4, 2),
    "qwen3": ("qwen3", False, 8, 2, 4),
    "qwen3-tied": ("qwen3", True, 4, 2, 2),
    "qwen3_moe": ("qwen3_moe", False, 4, 2, 4),
    "qwen3_moe-tied": ("qwen3_moe", True, 4, 2, 2),  # and the weights of a token's experts do not add up to 1
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
LAYOUTS = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1), (1, 1, 2), (2, 1, 2), (2, 2, 2), (1, 2, 2)]  # TP, PP, EP


@dataclass(frozen=True)
class Reference:
    """transformers' side."""

    directory: Path
    tensors: dict[str, torch.Tensor]
    logits_BSV: torch.Tensor


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reference]:
    root = tmp_path_factory.mktemp("models")
    return {name: make_reference(root / name, *MODELS[name]) for name in MODELS}


@torch.no_grad()
def make_reference(
    directory: Path, model_type: str, tied: bool, heads: int, key_value_heads: int, layers: int
) -> Reference:
    """Saves a random model; norms and biases are random too, else one that is lost or swapped would not show."""
    config = transformers.AutoConfig.for_model(
        model_type,
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.15,
        **({"head_dim": 24} if model_type != "qwen2" else {}),
        **(EXPERTS | {"norm_topk_prob": not tied} if model_type == "qwen3_moe" else {}),
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return Reference(directory, read_all(directory), model(tokens_BS(VOCAB_SIZE)).logits)


def read_all(directory: Path) -> dict[str, torch.Tensor]:
    checkpoint = HfCheckpoint(directory)
    return {name: checkpoint.read(name) for name in checkpoint.shapes}


def checksum(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


@pytest.mark.parametrize(("tp_size", "pp_size", "ep_size"), LAYOUTS)
def test_logits_refit_stream_and_export_equal_transformers(
    tp_size: int,
    pp_size: int,
    ep_size: int,
    references: dict[str, Reference],
    tmp_path: Path,
    run_distributed: Callable[..., CompletedProcess],
) -> None:
    num_ranks = max(tp_size, ep_size) * pp_size
    models = {name: each for name, each in references.items() if ep_size == 1 or name.startswith("qwen3_moe")}
    run_distributed(WORKER, num_ranks, tp_size, pp_size, ep_size, tmp_path, *(r.directory for r in models.values()))
    for name, reference in models.items():
        logits_BSV = load_file(tmp_path / f"{name}.safetensors")["logits_BSV"]
        torch.testing.assert_close(logits_BSV, reference.logits_BSV, atol=2e-5, rtol=0)

        expected = {tensor_name: checksum(tensor) for tensor_name, tensor in reference.tensors.items()}
        streams = [json.loads((tmp_path / f"{name}-{rank}.json").read_text()) for rank in range(num_ranks)]
        assert all(stream == streams[0] for stream in streams), "the ranks' streams differ"
        assert sorted(streams[0]) == sorted(map(list, expected.items()))

        exported = read_all(tmp_path / name)
        assert {tensor_name: checksum(tensor) for tensor_name, tensor in exported.items()} == expected
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        with torch.no_grad():
            assert torch.equal(model(tokens_BS(VOCAB_SIZE)).logits, reference.logits_BSV)
