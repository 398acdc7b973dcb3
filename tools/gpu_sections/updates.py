"""Small models with equal weights everywhere, and one update of theirs, whose parts can be
compared."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from megatron_opd.architectures.architecture import Architecture, Experts
from megatron_opd.contracts.rows import Episode, Row, Task
from megatron_opd.contracts.signals import Signals
from megatron_opd.mcore import parallel as groups
from megatron_opd.mcore.batch import Columns
from megatron_opd.mcore.model import build_model
from megatron_opd.methods.catalogue import CATALOGUE
from megatron_opd.objective.columns import build_columns
from megatron_opd.objective.loss import Objective
from megatron_opd.recipe.keys import LossScaleConfig, RolloutConfig, RunConfig
from megatron_opd.runs.learner import batch_of
from megatron_opd.trainer.step import student_signals, update
from megatron_opd.trainer.student import prepare
from megatron_opd.world import processes
from tests.tiny_config import tiny_config

LENGTHS = (96, 128, 64, 120, 40, 128, 100, 88)

_QWEN3 = Architecture(
    "qwen3",
    vocab_size=1024,
    hidden_size=256,
    num_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
    intermediate_size=512,
    max_position_embeddings=4096,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    tie_word_embeddings=False,
    qkv_bias=False,
    qk_norm=True,
)
_ARCHITECTURES = {
    "qwen3": _QWEN3,
    "qwen2": replace(
        _QWEN3, model_type="qwen2", qkv_bias=True, qk_norm=False, tie_word_embeddings=True
    ),
    "qwen3_moe": replace(
        _QWEN3,
        model_type="qwen3_moe",
        experts=Experts(count=8, per_token=2, intermediate_size=128, normalise_top=True),
    ),
}


def architectures(*, small: bool) -> dict[str, Architecture]:
    """Two layers of two dense families and one of experts."""
    if not small:
        return _ARCHITECTURES
    sizes: dict[str, Any] = {
        "vocab_size": 256,
        "hidden_size": 64,
        "head_dim": 16,
        "intermediate_size": 96,
    }
    return {name: replace(arch, **sizes) for name, arch in _ARCHITECTURES.items()}


class Update(TypedDict):
    """Before an update, of it, and after it; float32 on the host."""

    logprobs: Tensor
    entropy: Tensor
    norm: float
    applied: bool
    gradients: dict[str, Tensor]
    changes: dict[str, Tensor]  # what the optimizer moved the parameters by


def recipe(
    precision: str, longest: int, micro_batch_tokens: int, *, fused: bool = True, **changes: Any
) -> RunConfig:
    """GRPO on eight rollouts. `changes`: as for tiny_config."""
    rollout = RolloutConfig(num_prompts=4, samples_per_prompt=2, max_completion_tokens=longest // 2)
    return tiny_config(
        1e-3,
        max_sequence_length=longest,
        method=CATALOGUE["grpo"].method,
        precision=precision,
        rollout=rollout,
        micro_batch_tokens=micro_batch_tokens,
        fused_output_layer=fused,
        clip_grad=0.0,
        loss_scale=LossScaleConfig(initial=2.0**12),
        **changes,
    )


def rows_of(vocab: int, lengths: Sequence[int]) -> list[Row]:
    """Of random tokens, half of each the prompt; two of a prompt, one of which is right."""
    rng = np.random.default_rng(0)

    def ids(count: int) -> np.ndarray:
        return rng.integers(0, vocab, count).astype(np.int32)

    return [
        Row.of_student(
            Episode(
                Task(i // 2, "", "", "", ids(length - length // 2)),
                sample=i % 2,
                group=i // 2,
                reward=float(i % 2),
            ),
            ids(length // 2),
            np.full(length // 2, -math.log(vocab), np.float32),
            version=0,
        )
        for i, length in enumerate(lengths)
    ]


def columns_of(rows: Sequence[Row], config: RunConfig) -> Columns:
    return build_columns(config.method, batch_of(config, rows, Signals(None), step=0))


def one_update(arch: Architecture, precision: str) -> Update:
    """On this process's device."""
    processes.start()
    micro_batch_tokens = 2 * max(LENGTHS)
    config = recipe(precision, max(LENGTHS), micro_batch_tokens)
    parallel = groups.create(config.student.layout)
    chunks = build_model(arch, parallel, precision=precision)
    _fill(chunks)
    start = _on_host({key: p.data for key, p in chunks[0].named_parameters()})
    rows = rows_of(arch.vocab_size, LENGTHS)
    student = prepare(chunks, arch, parallel, config)
    before = student_signals(student, rows, temperature=1.0, micro_batch_tokens=micro_batch_tokens)
    objective = Objective(config.method, arch.vocab_size, 1.0)
    sums, applied = update(
        student,
        rows,
        columns_of(rows, config),
        objective,
        step=0,
        micro_batch_tokens=micro_batch_tokens,
    )
    named = dict(student.bare_chunks[0].named_parameters())
    after = _on_host({key: p.data for key, p in named.items()})
    return {
        "logprobs": torch.from_numpy(before.logprobs_T),
        "entropy": torch.from_numpy(before.entropy_T),
        "norm": sums["train/grad_norm"],
        "applied": applied,
        "gradients": _on_host({key: getattr(p, "main_grad") for key, p in named.items()}),  # noqa: B009
        "changes": {key: value - start[key] for key, value in after.items()},
    }


def _fill(chunks: list[torch.nn.Module]) -> None:
    """Weights that every precision holds exactly: of few bits, and none too small for float16."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in chunks[0].named_parameters():
        values = torch.randn(parameter.shape, generator=generator) * 0.05
        values = (1 + values if "norm" in name else values).mul(2**10).round().div(2**10)
        parameter.data.copy_(values.bfloat16())


def _on_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().float().cpu().clone() for name, tensor in tensors.items()}
