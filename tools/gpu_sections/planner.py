"""A model of 1.5 B parameters, one update: the memory that the planner foretells, and the time it
takes."""

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from megatron_opd.architectures.architecture import Architecture, parse_architecture
from megatron_opd.architectures.known import TABLE
from megatron_opd.mcore import parallel as groups
from megatron_opd.mcore.model import build_model
from megatron_opd.objective.loss import Objective
from megatron_opd.planning.case import Case
from megatron_opd.planning.hardware import hardware
from megatron_opd.planning.memory import rank_kinds
from megatron_opd.trainer.step import update
from megatron_opd.trainer.student import prepare
from megatron_opd.world import processes
from tools.gpu_sections import apart
from tools.gpu_sections.machine import GIB, Machine
from tools.gpu_sections.rows import Row, exactly, measured, skipped, within
from tools.gpu_sections.updates import columns_of, recipe, rows_of

# fused output layer, recomputation
SETTINGS = ((True, "none"), (True, "selective"), (False, "none"))
SET_ASIDE = 3  # GiB outside of the allocator, planning/hardware.py


class Peak(NamedTuple):
    bytes: int
    seconds: float
    parameters: int


def check(machine: Machine) -> Iterator[Row]:
    """The phase "train" without an engine, after the moments exist."""
    read = lambda path: json.loads(Path(path).read_text())  # noqa: E731
    planned = apart.ask("planned", read, small=machine.small, hide_cuda=True)
    if machine.is_cuda:
        same = apart.ask("planned", read, small=machine.small, hide_cuda=False) == planned
        yield exactly("a plan beside a GPU is that of a machine without", same, True)
    else:
        yield skipped("a plan beside a GPU is that of a machine without", "needs a GPU")
    for setting, wanted in zip(SETTINGS, planned, strict=True):
        yield from _measure(machine, *setting, wanted)
        machine.tidy()


def _measure(machine: Machine, fused: bool, recompute: str, planned: int) -> Iterator[Row]:
    arch, longest, tokens = _sizes(machine.small)
    name = f"{tokens} tokens, {'fused' if fused else 'whole logits'}, recompute {recompute}"
    if reason := machine.lacks(1.1 * planned):
        yield skipped(name, reason)
        return
    if machine.seconds_left < 20:
        yield skipped(name, "the time is up")
        return
    peak = _update(machine, arch, longest, tokens, fused, recompute)
    yield within(
        f"{name}: planned / measured ({peak.bytes / GIB:.3g} GiB)", planned / peak.bytes, 0.9, 1.1
    )
    trained = 8 * longest
    attention = 6 * arch.num_layers * arch.hidden_size * longest
    share = (6 * peak.parameters + attention) * trained / peak.seconds / machine.product_rate
    yield measured(
        f"{name}: seconds of {trained} tokens",
        peak.seconds,
        machine.beside(f"{share:.0%} of a product's rate"),
    )
    if machine.is_cuda:
        free, total = torch.cuda.mem_get_info()
        held = torch.cuda.memory_reserved()
        yield measured(
            f"{name}: reserved / measured", torch.cuda.max_memory_reserved() / peak.bytes
        )
        yield measured(
            f"{name}: outside of the allocator, GiB",
            (total - free - held) / GIB,
            f"{SET_ASIDE} set aside",
        )


def _update(
    machine: Machine, arch: Architecture, longest: int, tokens: int, fused: bool, recompute: str
) -> Peak:
    config = recipe("bfloat16", longest, tokens, fused=fused, recompute_granularity=recompute)
    processes.start()
    with machine.live_bytes() as live:
        parallel = groups.create(config.student.layout)
        chunks = build_model(
            arch, parallel, precision="bfloat16", recompute=config.train.recompute_granularity
        )
        for parameter in chunks[0].parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        rollouts = rows_of(arch.vocab_size, [longest] * 8)
        student = prepare(chunks, arch, parallel, config)
        columns, objective = (
            columns_of(rollouts, config),
            Objective(config.method, arch.vocab_size, 1.0),
        )
        for _ in range(2):  # the moments exist after the first
            machine.synchronise()
            start = time.perf_counter()
            update(student, rollouts, columns, objective, step=0, micro_batch_tokens=tokens)
            machine.synchronise()
        return Peak(
            live(), time.perf_counter() - start, sum(p.numel() for p in chunks[0].parameters())
        )


def planned_bytes(*, small: bool) -> list[int]:
    """The planner makes process groups of its own: to be asked in a process apart."""
    arch, longest, tokens = _sizes(small)
    planned = []
    for fused, recompute in SETTINGS:
        config = recipe("bfloat16", longest, tokens, fused=fused, recompute_granularity=recompute)
        (kind,) = rank_kinds(
            Case(config, {"student": arch}, hardware("cpu" if small else "h100", 1), 1, 1)
        )
        items = kind.phases["train"]
        planned.append(kind.total("train") - items.get("engine", 0) - items.get("KV cache", 0))
    return planned


def _sizes(small: bool) -> tuple[Architecture, int, int]:
    """(model, longest sequence, tokens of a micro-batch)."""
    arch = parse_architecture(json.loads(TABLE.read_text())["Qwen2.5-Math-1.5B"], TABLE)
    if not small:
        return arch, 4096, 8192
    arch = replace(
        arch,
        num_layers=2,
        hidden_size=64,
        head_dim=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        vocab_size=512,
    )
    return arch, 64, 128
