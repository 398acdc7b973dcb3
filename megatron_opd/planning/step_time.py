"""An estimate of a step's seconds, to rank layouts by; nothing of it has been measured on a GPU.

Products run at `COMPUTE` of the peak, decoding reads weights and cache at `BANDWIDTH` of the memory's, collectives run at
`LINK` of the slowest link they use, one after the other with the computation (nothing overlaps, as in our schedules).
Every sequence is as long as the recipe allows, and rewards cost nothing: it compares layouts, it does not predict a run.
"""

import functools
from dataclasses import dataclass

from megatron_opd.config.architecture import Architecture
from megatron_opd.config.schema import LayoutConfig
from megatron_opd.planning.case import Case
from megatron_opd.planning.engine import engine
from megatron_opd.planning.hardware import BANDWIDTH, COMPUTE, LINK
from megatron_opd.planning.states import Stage, stages


@dataclass(frozen=True)
class StepTime:
    """Seconds by phase."""

    generate: float
    teacher: float
    train: float
    refit: float

    @property
    def total(self) -> float:
        return self.generate + self.teacher + self.train + self.refit


@dataclass(frozen=True)
class Work:
    """Parameters that a token meets in products, of the whole model."""

    layers: int  # those outside experts
    experts: int  # those of a token's experts
    head: int


def step_time(case: Case) -> StepTime:
    updates = case.config.train.updates_per_step
    passes = [forward_time(case, "student", case.samples)] if case.needs.student_pass else []
    models = 2 if case.needs.process else 1
    passes += [updates * update_time(case)] + ([update_time(case)] if models == 2 else [])
    passes += [forward_time(case, "teacher", case.samples)] if case.needs.teacher_head else []
    scored = [forward_time(case, "teacher", case.samples)] if case.reads_teacher and case.needs.teacher else []
    scored += [forward_time(case, "student", case.samples)] * (case.needs.reference + case.needs.process)
    return StepTime(generate_time(case), sum(scored), sum(passes), refit_time(case))


@functools.cache
def work(arch: Architecture) -> Work:
    """Counted on the modules of the whole model."""
    (whole,) = stages(arch, LayoutConfig(), "bfloat16")
    layer = sum(each.numel() for each in whole.layer)
    experts = 0
    if arch.experts:
        one = 3 * arch.hidden_size * arch.experts.intermediate_size  # gate, up, down
        experts = arch.experts.per_token * one
        layer -= arch.experts.count * one
    head = arch.vocab_size * arch.hidden_size
    return Work(layer * arch.num_layers, experts * arch.num_layers, head)


# ----------------------------------------------------------------------------------------------------- training passes
def update_time(case: Case) -> float:
    """Backward passes cost two forward passes; a fused output layer makes its logits once more."""
    samples = case.samples_per_update
    once_more = _head_seconds(case, samples) if case.config.train.fused_output_layer else 0.0
    return 3 * forward_time(case, "student", samples) + once_more + _reduce_seconds(case)


def forward_time(case: Case, name: str, samples: int) -> float:
    """Of all micro-batches of a replica through its pipeline, whose bubble adds PP - 1 of them."""
    batch, layout = case.micro_batch(name), case.model(name).layout
    tp, pp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    counted, arch = work(case.architectures[name]), case.architectures[name]
    attention = 2 * batch.length * arch.num_attention_heads * arch.head_dim * arch.num_layers  # causal: half the square
    # Without sequence parallelism every tensor-parallel rank sends all tokens to the experts.
    repeated = 1 if layout.sequence_parallel else tp
    per_token = 2 * (counted.layers + repeated * counted.experts) + attention
    flops = batch.tokens * per_token / (tp * pp) + batch.tokens * 2 * counted.head / tp / pp
    seconds = flops / (COMPUTE * case.hardware.flops) + _layer_collectives(case, name) * arch.num_layers / pp
    if pp > 1:
        seconds += 2 * batch.hidden / _link(case, case.gpus // pp + 1)
    return seconds * (case.micro_batches(name, samples) + pp - 1)


def _layer_collectives(case: Case, name: str) -> float:
    """Two sums over the tensor-parallel ranks (or, with sequence parallelism, a gather and a scatter each, as long),
    and the exchange of tokens with the ranks of their experts and back. Seconds of one micro-batch in one layer."""
    batch, layout = case.micro_batch(name), case.model(name).layout
    tp, ep = layout.tensor_model_parallel_size, layout.expert_model_parallel_size
    seconds = 2 * 2 * (tp - 1) / tp * batch.whole_hidden / _link(case, tp)
    if batch.arch.experts:
        sent = batch.arch.experts.per_token * batch.hidden * (ep - 1) / ep
        seconds += 2 * sent / _link(case, ep)
    return seconds


def _head_seconds(case: Case, samples: int) -> float:
    batch = case.micro_batch("student")
    flops = 2 * batch.sequences * batch.predicted * batch.output_weight
    return flops * case.micro_batches("student", samples) / (COMPUTE * case.hardware.flops)


def _reduce_seconds(case: Case) -> float:
    """Gradients in float32 scattered over the replicas, parameters gathered from them."""
    replicas = case.replicas("student")
    stage = _stage(case)
    moved = (replicas - 1) / replicas * stage.num_bytes * (4 / case.element + 1)
    layout = case.config.student.layout
    return moved / _link(case, replicas * layout.tensor_model_parallel_size) if replicas > 1 else 0.0


# ------------------------------------------------------------------------------------------------- sampling, the refit
def generate_time(case: Case) -> float:
    """Decoding, bound by memory or by products: as many sequences at a time as the cache holds."""
    if not case.needs.rollouts:
        return 0.0
    held, settings = engine(case, "student"), case.config.rollout
    mine = -(-settings.num_prompts // case.gpus) * settings.samples_per_prompt
    at_once = min(mine, case.hardware.engine_sequences, held.sequences(case.config.max_sequence_length))
    if at_once == 0:
        return float("inf")
    completion = settings.max_completion_tokens
    context = case.config.max_sequence_length - completion / 2  # on average, while a completion grows
    counted = work(case.architectures["student"])
    read = (held.weights + at_once * context * held.cache_per_token) / (BANDWIDTH * case.hardware.memory_bandwidth)
    computed = at_once * 2 * (counted.layers + counted.experts + counted.head) / (COMPUTE * case.hardware.flops)
    return -(-mine // at_once) * completion * max(read, computed)


def refit_time(case: Case) -> float:
    """The parts of each tensor meet on every rank of a replica; on CUDA the engine's weights come from the host and
    go back there."""
    if not case.needs.rollouts:
        return 0.0
    layout = case.config.student.layout
    ranks = layout.tensor_model_parallel_size * layout.pipeline_model_parallel_size
    apart = case.gpus if layout.pipeline_model_parallel_size > 1 else ranks
    weights = engine(case, "student").weights
    gathered = weights * (ranks - 1) / ranks / _link(case, apart)
    return gathered + (2 * weights / (LINK * case.hardware.host_link) if case.hardware.is_cuda else 0.0)


def _stage(case: Case) -> Stage:
    """The student's largest stage."""
    found = stages(case.architectures["student"], case.config.student.layout, case.config.precision)
    return max(found, key=lambda stage: stage.num_bytes)


def _link(case: Case, ranks: int) -> float:
    """Bytes per second within a group of neighbouring ranks."""
    hardware = case.hardware
    return LINK * (hardware.network_link if ranks > case.gpus_per_node else hardware.node_link)
