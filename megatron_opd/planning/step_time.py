"""An estimate of a step's seconds, to rank layouts by; it has not been measured on a GPU.

Products run at `COMPUTE` of the peak, decoding reads weights and cache at `BANDWIDTH` of the
memory's, and collectives run at `LINK` of the slowest link they use. Nothing overlaps, as in our
schedules, in which roles with processes of their own wait for one another too. Every sequence is as
long as the recipe allows, every expert has as many tokens, and rewards cost nothing: the estimate
compares layouts, and predicts no run.
"""

import functools
import math
from dataclasses import dataclass

from megatron_opd.architectures.architecture import Architecture
from megatron_opd.architectures.config import LayoutConfig
from megatron_opd.planning.activations import FLOAT32
from megatron_opd.planning.case import Case
from megatron_opd.planning.engine_memory import engine
from megatron_opd.planning.hardware import BANDWIDTH, CHANNEL, COMPUTE, LINK
from megatron_opd.planning.states import stages


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
    """The numbers of parameters that a token meets in products, of the whole model."""

    layers: int  # outside experts, MLPs included
    mlp: int  # in MLPs
    experts: int  # in a token's experts
    head: int


def step_time(case: Case) -> StepTime:
    """Seconds of a step's phases."""
    needs = case.needs
    student = forward_time(case, "student", case.samples)
    teacher = 0.0
    if case.reads_teacher:
        teacher = forward_time(case, "teacher", case.samples) + _asked(case)
    updates = case.config.train.updates_per_step * update_time(case, case.samples_per_update)
    process = update_time(case, case.samples) if needs.process else 0.0
    scoring = needs.teacher * teacher + _arrival(case)
    scoring += (needs.reference + needs.process) * student
    training = updates + process + needs.student_pass * student + needs.teacher_head * teacher
    return StepTime(
        generate=generate_time(case),
        teacher=scoring,
        train=training,
        refit=refit_time(case),
    )


def _arrival(case: Case) -> float:
    """Seconds for an offloaded teacher's weights over the link to the host."""
    if not case.offloads_teacher:
        return 0.0
    model = case.model("teacher")
    of_teacher = stages(case.architecture("teacher"), model.layout, case.config.precision)
    return max(stage.num_bytes for stage in of_teacher) / (LINK * case.hardware.host_link)


def _asked(case: Case) -> float:
    """Seconds for rollouts to a teacher on processes of its own, and for signals back."""
    if not case.config.teacher_processes:
        return 0.0
    signals = FLOAT32 * case.signals(case.needs.topk)
    return _channel(case, _rollout_bytes(case), "teacher") + _channel(case, signals, "student")


def _channel(case: Case, num_bytes: float, to: str) -> float:
    """Seconds from one process to all of a role, along gloo's binomial tree over all nodes."""
    rounds = math.ceil(math.log2(1 + case.gpus_of(to)))
    return rounds * num_bytes / min(CHANNEL, LINK * case.hardware.network_link)


def _rollout_bytes(case: Case) -> int:
    """Bytes of a step's ids and logprobs, compared with which texts are small."""
    return case.samples * case.predicted * 2 * FLOAT32


@functools.cache
def work(arch: Architecture) -> Work:
    """The work of a token, counted on the modules of the whole model."""
    (model,) = stages(arch, LayoutConfig(), "bfloat16")
    layer = sum(parameter.numel() for parameter in model.layer)
    mlp = 3 * arch.hidden_size * arch.intermediate_size  # gate, up, down
    experts = 0
    if arch.experts:
        expert = 3 * arch.hidden_size * arch.experts.intermediate_size
        mlp = 0
        experts = arch.experts.per_token * expert
        layer -= arch.experts.count * expert
    head = arch.vocab_size * arch.hidden_size
    return Work(layer * arch.num_layers, mlp * arch.num_layers, experts * arch.num_layers, head)


# ---------------------------------------------------------------------------------- training passes
def forward_time(case: Case, name: str, samples: int) -> float:
    """Seconds of a replica's micro-batches in its pipeline, whose bubble adds PP - 1 more."""
    seconds = _products(case, name) + _collectives(case, name)
    return seconds * (case.micro_batches(name, samples) + _stages(case, name) - 1)


def update_time(case: Case, samples: int) -> float:
    """Seconds of an update's forward and backward passes, and the gradients' reduction.

    The backward pass has twice the products of the forward pass and as many collectives. A fused
    output layer computes its logits once more, and recomputed activations are added.
    """
    mlp = _mlp_products(case, "student") + _exchange(case, "student")
    products = _products(case, "student")
    collectives = _collectives(case, "student")
    again = {
        "none": 0.0,
        "selective": mlp,
        "full": products - _head_products(case, "student") + collectives,
    }[case.config.train.recompute_granularity]
    seconds = 3 * products + 2 * collectives + again
    if case.config.train.fused_output_layer:
        seconds += _head_products(case, "student")
    passes = case.micro_batches("student", samples) + _stages(case, "student") - 1
    return seconds * passes + _reduce_seconds(case)


def _products(case: Case, name: str) -> float:
    """Seconds of a micro-batch's products in a forward pass's slowest stage, the last."""
    arch = case.architecture(name)
    # Causal attention takes half of the square.
    width = arch.num_attention_heads * arch.head_dim
    attention = 2 * case.longest(name) * width * arch.num_layers
    dense = 2 * (work(arch).layers - work(arch).mlp) + attention
    return _per_rank(case, name, dense) + _mlp_products(case, name) + _head_products(case, name)


def _mlp_products(case: Case, name: str) -> float:
    """Seconds of a stage's MLPs, or of its experts."""
    arch = case.architecture(name)
    layout = case.model(name).layout
    if arch.experts is None:
        return _per_rank(case, name, 2 * work(arch).mlp)
    # Without sequence parallelism every tensor-parallel rank sends all tokens to the experts.
    repeated = 1 if layout.sequence_parallel else layout.tensor_model_parallel_size
    return _per_rank(case, name, 2 * repeated * work(arch).experts)


def _per_rank(case: Case, name: str, operations: int) -> float:
    """Seconds of a rank for a micro-batch, given a token's operations in the whole model."""
    ranks = case.model(name).layout.tensor_model_parallel_size * _stages(case, name)
    return case.micro_batch(name).tokens * operations / (ranks * COMPUTE * case.hardware.flops)


def _head_products(case: Case, name: str) -> float:
    batch = case.micro_batch(name)
    return 2 * batch.predicted * batch.output_weight / (COMPUTE * case.hardware.flops)


def _collectives(case: Case, name: str) -> float:
    """Seconds of a micro-batch's collectives in one stage of a forward pass.

    A layer has two sums over the tensor-parallel ranks (or, with sequence parallelism, as many
    gathers and scatters, which take as long), the keys and values of the other context-parallel
    ranks, and the tokens on their way to experts. The stream goes from stage to stage.
    """
    batch = case.micro_batch(name)
    tp = case.model(name).layout.tensor_model_parallel_size
    pp = _stages(case, name)
    # Experts are not sliced: their ranks exchange rows instead of a sum.
    sums = 2 if batch.arch.experts is None else 1
    layer = sums * 2 * (tp - 1) / tp * batch.whole_hidden / _link(case, name, tp)
    ranks = case.model(name).layout.context_parallel_size
    layer += 2 * batch.key * (ranks - 1) / _link(case, name, tp * ranks)
    to_next = batch.hidden / _link(case, name, case.gpus_of(name)) if pp > 1 else 0.0
    return layer * batch.arch.num_layers / pp + _exchange(case, name) + to_next


def _exchange(case: Case, name: str) -> float:
    """Seconds for rows to the ranks of their experts and back, in the layers of a stage."""
    batch = case.micro_batch(name)
    ranks = case.model(name).layout.expert_parallel_size
    if batch.arch.experts is None:
        return 0.0
    layer = 2 * batch.routed * (ranks - 1) / ranks / _link(case, name, ranks)
    return layer * batch.arch.num_layers / _stages(case, name)


def _stages(case: Case, name: str) -> int:
    return case.model(name).layout.pipeline_model_parallel_size


def _reduce_seconds(case: Case) -> float:
    """Seconds to scatter float32 gradients over the replicas and to gather parameters again."""
    layout = case.config.student.layout
    ranks = case.stage_size("student")
    bytes_moved = FLOAT32 / case.element + 1
    dense_moved = 1 - layout.tensor_model_parallel_size / ranks
    experts_moved = 1 - layout.expert_parallel_size / ranks
    seconds = []
    for stage in stages(case.architectures["student"], layout, case.config.precision):
        dense = (stage.num_bytes - stage.expert_bytes) * dense_moved * bytes_moved
        experts = stage.expert_bytes * experts_moved * bytes_moved
        seconds.append(dense + experts)
    return max(seconds) / _link(case, "student", ranks)


# ------------------------------------------------------------------------------ sampling, the refit
def generate_time(case: Case) -> float:
    """Seconds of decoding, bound by memory or by products; the cache limits the sequences."""
    if not case.needs.rollouts:
        return 0.0
    memory = engine(case, "student")
    settings = case.config.rollout
    longest = case.config.max_sequence_length
    share = -(-settings.num_prompts // case.gpus_of("rollout")) * settings.samples_per_prompt
    at_once = min(share, case.hardware.engine_sequences, memory.sequences(longest))
    if at_once == 0:
        return float("inf")
    completion = case.sampled
    context = longest - completion / 2  # on average, while a completion grows
    token = work(case.architectures["student"])
    bytes_read = _weights_read(case, at_once) + at_once * context * memory.cache_per_token
    read = bytes_read / (BANDWIDTH * case.hardware.memory_bandwidth)
    operations = 2 * (token.layers + token.experts + token.head)
    computed = at_once * operations / (COMPUTE * case.hardware.flops)
    passes = -(-share // at_once) * case.rows_per_episode
    seconds = passes * completion * max(read, computed)
    apart = "rollout" in case.config.processes_apart
    return seconds + (_channel(case, _rollout_bytes(case), "student") if apart else 0.0)


def _weights_read(case: Case, sequences: int) -> float:
    """Bytes of the engine's weights that a step of decoding reads, without experts not chosen."""
    experts = case.architectures["student"].experts
    weights = engine(case, "student").weights
    if experts is None:
        return weights
    not_chosen = (1 - experts.per_token / experts.count) ** sequences
    return weights - _bytes_of_experts(case) * not_chosen


def _bytes_of_experts(case: Case) -> float:
    """Bytes of all the student's experts, in the engine."""
    arch = case.architectures["student"]
    if arch.experts is None:
        return 0.0
    return work(arch).experts / arch.experts.per_token * arch.experts.count * case.element


def refit_time(case: Case) -> float:
    """Seconds of the gathers, and of the ways to and from the host.

    Every rank of a replica gets a tensor's slices, and every rank gets the experts. On CUDA the
    engine's weights come from the host and go back there; for engines on processes of their own,
    the new ones go through the host.
    """
    if not case.needs.rollouts:
        return 0.0
    layout = case.config.student.layout
    weights = engine(case, "student").weights
    experts = _bytes_of_experts(case)
    pp = _stages(case, "student")
    seconds = _gather(case, weights - experts, layout.tensor_model_parallel_size * pp)
    seconds += _gather(case, experts, layout.expert_parallel_size * pp)
    if "rollout" in case.config.processes_apart:
        seconds += _channel(case, weights, "rollout")
    if case.hardware.is_cuda:
        seconds += 2 * weights / (LINK * case.hardware.host_link)
    return seconds


def _gather(case: Case, num_bytes: float, slices: int) -> float:
    """Seconds until all ranks of a replica have tensors that are spread over `slices` of them."""
    ranks = case.gpus_of("student") if _stages(case, "student") > 1 else slices
    return num_bytes * (slices - 1) / slices / _link(case, "student", ranks)


def _link(case: Case, role: str, ranks: int) -> float:
    """Bytes per second within a group of neighbouring ranks of a role."""
    hardware = case.hardware
    node = case.gpus_per_node
    # A role that begins within a node may have groups on two.
    first_of_nodes = range(-case.ranks_of(role).start % node, case.gpus_of(role), node)
    crosses = ranks > node or any(start % ranks for start in first_of_nodes[:2])
    return LINK * (hardware.network_link if crosses else hardware.node_link)
