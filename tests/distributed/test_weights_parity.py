"""Every layout gives transformers' logits from transformers' weights, and gives the weights back
bit for bit."""

import hashlib
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from megatron_opd.architectures.architecture import SUPPORTED
from megatron_opd.weights.hf import HfCheckpoint
from tests.distributed.weights_worker import tokens_BS

WORKER = Path(__file__).with_name("weights_worker.py")
VOCAB_SIZE = 131  # odd: tensor parallelism has to pad it
# name -> (model_type, tied, heads, key-value heads, layers, RoPE)
MODELS = {
    "qwen2": ("qwen2", False, 4, 2, 2, "default"),
    "qwen2-tied": ("qwen2", True, 4, 4, 2, "yarn"),
    "qwen3": ("qwen3", False, 8, 2, 4, "default"),
    "qwen3-tied": ("qwen3", True, 4, 2, 2, "linear"),
    "qwen3_moe": ("qwen3_moe", False, 4, 2, 4, "default"),
    # a token's experts do not add up to 1
    "qwen3_moe-tied": ("qwen3_moe", True, 4, 2, 2, "yarn-mscale"),
    "llama": ("llama", False, 4, 2, 2, "llama3"),
    "llama-tied": ("llama", True, 8, 2, 4, "default"),
    "mistral": ("mistral", False, 4, 2, 2, "default"),
}
# The fixed tokens are more than the original context; between the types, frequencies are kept,
# divided and mixed.
ROPES = {
    "default": {},
    "linear": {"factor": 2.0},
    "llama3": {
        "factor": 4.0,
        "low_freq_factor": 0.5,
        "high_freq_factor": 1.2,
        "original_max_position_embeddings": 8,
    },
    "yarn": {
        "factor": 4.0,
        "beta_fast": 1,
        "beta_slow": 0.2,
        "original_max_position_embeddings": 8,
    },
    "yarn-mscale": {
        "factor": 8.0,
        "beta_fast": 1,
        "beta_slow": 0.3,
        "truncate": False,
        "original_max_position_embeddings": 8,
        "mscale": 3.0,
        "mscale_all_dim": 0.5,
    },
    "yarn-given": {"factor": 8.0, "attention_factor": 1.5, "original_max_position_embeddings": 8},
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
LAYOUTS = [  # TP, PP, EP, ETP
    (1, 1, 1, 1),
    (2, 1, 1, 1),
    (1, 2, 1, 1),
    (2, 2, 1, 1),
    (1, 1, 2, 1),
    (2, 1, 2, 1),
    (2, 2, 2, 1),
    (1, 2, 2, 1),
    (2, 1, 1, 2),
    (1, 2, 1, 2),
    (2, 1, 2, 2),
]


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
    directory: Path,
    model_type: str,
    tied: bool,
    heads: int,
    key_value_heads: int,
    layers: int,
    rope: str,
) -> Reference:
    """Saves a random model; norms and biases are random too, else one that is lost or swapped would
    not show."""
    torch.manual_seed(0)
    config = make_config(model_type, tied, heads, key_value_heads, layers, rope)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return Reference(directory, read_all(directory), model(tokens_BS(VOCAB_SIZE)).logits)


def make_config(
    model_type: str, tied: bool, heads: int, key_value_heads: int, layers: int, rope: str
) -> Any:
    return transformers.AutoConfig.for_model(
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
        rope_parameters={"rope_type": rope.partition("-")[0], "rope_theta": 10000.0} | ROPES[rope],
        **({"head_dim": 24} if model_type != "qwen2" else {}),
        **({"sliding_window": None} if model_type == "mistral" else {}),
        **(EXPERTS | {"norm_topk_prob": not tied} if model_type == "qwen3_moe" else {}),
    )


def read_all(directory: Path) -> dict[str, torch.Tensor]:
    checkpoint = HfCheckpoint(directory)
    return {name: checkpoint.read(name) for name in checkpoint.shapes}


def checksum(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


@pytest.mark.parametrize(("tp_size", "pp_size", "ep_size", "etp_size"), LAYOUTS)
def test_logits_refit_stream_and_export_equal_transformers(
    tp_size: int,
    pp_size: int,
    ep_size: int,
    etp_size: int,
    references: dict[str, Reference],
    tmp_path: Path,
    run_distributed: Callable[..., CompletedProcess],
) -> None:
    num_ranks, experts = max(tp_size, ep_size * etp_size) * pp_size, ep_size * etp_size > 1
    models = {
        name: each
        for name, each in references.items()
        if not experts or name.startswith("qwen3_moe")
    }
    directories = [reference.directory for reference in models.values()]
    run_distributed(WORKER, num_ranks, tp_size, pp_size, ep_size, etp_size, tmp_path, *directories)
    for name, reference in models.items():
        logits_BSV = load_file(tmp_path / f"{name}.safetensors")["logits_BSV"]
        torch.testing.assert_close(logits_BSV, reference.logits_BSV, atol=2e-5, rtol=0)

        expected = {
            tensor_name: checksum(tensor) for tensor_name, tensor in reference.tensors.items()
        }
        streams = [
            json.loads((tmp_path / f"{name}-{rank}.json").read_text()) for rank in range(num_ranks)
        ]
        assert all(stream == streams[0] for stream in streams), "the ranks' streams differ"
        assert sorted(streams[0]) == sorted(map(list, expected.items()))

        exported = read_all(tmp_path / name)
        assert {
            tensor_name: checksum(tensor) for tensor_name, tensor in exported.items()
        } == expected
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        with torch.no_grad():
            assert torch.equal(model(tokens_BS(VOCAB_SIZE)).logits, reference.logits_BSV)


def test_every_architecture_has_every_rope(
    tmp_path: Path, run_distributed: Callable[..., CompletedProcess]
) -> None:
    """On one process; and the logits of another RoPE are far away, so that a scaling that is lost
    shows."""
    logits, references = {}, {}
    for model_type, rope, tied in itertools.product(SUPPORTED, ROPES, (False, True)):
        name = f"{model_type}-{rope}-{tied}"
        references[name] = make_reference(
            tmp_path / "models" / name, model_type, tied, 4, 2, 1, rope
        )
    run_distributed(
        WORKER, 1, 1, 1, 1, 1, tmp_path, *(reference.directory for reference in references.values())
    )
    for name, reference in references.items():
        logits[name] = load_file(tmp_path / f"{name}.safetensors")["logits_BSV"]
        torch.testing.assert_close(logits[name], reference.logits_BSV, atol=1e-5, rtol=0)
    for model_type, rope, other in itertools.product(SUPPORTED, ROPES, ROPES):
        difference = (
            (logits[f"{model_type}-{rope}-True"] - logits[f"{model_type}-{other}-True"]).abs().max()
        )
        assert rope == other or difference > 0.02, (model_type, rope, other, difference)
