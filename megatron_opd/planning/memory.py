"""Bytes of every rank in every phase of a step.

Resident throughout: the student's parameters, gradients and optimizer state, frozen models, and on
the host the engine. On CUDA the engine sleeps but in `generate` and `refit`, where it has its whole
share of the device. Roles with processes of their own are resident there and nowhere else; the
others wait meanwhile, with what is theirs.
"""

import functools
import itertools
import math
from dataclasses import dataclass

from megatron_opd.architectures.architecture import Architecture
from megatron_opd.planning import activations
from megatron_opd.planning.activations import FLOAT32
from megatron_opd.planning.case import Case
from megatron_opd.planning.engine_memory import EngineMemory, engine
from megatron_opd.planning.hardware import GIB
from megatron_opd.planning.states import Stage, TrainedBytes, stages, state_bytes, trained_stages
from megatron_opd.weights.table import weight_table

PHASES = ("generate", "teacher", "train", "refit")


@dataclass(frozen=True)
class RankKind:
    """Ranks that hold the same: one stage of each model that lies there."""

    stages: dict[str, int]  # role -> stage; an engine has one
    first_rank: int
    ranks: int
    phases: dict[str, dict[str, int]]  # phase -> what -> bytes, without what is 0
    idle: tuple[str, ...]  # phases in which the ranks wait for those of another role

    def total(self, phase: str) -> int:
        return sum(self.phases[phase].values())

    @property
    def peak(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=self.total)


def rank_kinds(case: Case) -> list[RankKind]:
    """In order of their first ranks. Of the replicas, whose shards differ by padding, the fullest
    stands for all."""
    held = [(role, case.ranks_of(role), case.stage_size(role)) for role in case.roles]
    starts = {start for _, ranks, size in held for start in ranks[::size]}
    kinds = []
    for first, end in itertools.pairwise(sorted({*starts, case.gpus})):
        here = {role: (first - ranks.start) // size for role, ranks, size in held if first in ranks}
        phases = _phases(case, here)
        kinds.append(RankKind(here, first, end - first, phases, _idle(case, here, phases)))
    return kinds


def _idle(case: Case, here: dict[str, int], phases: dict[str, dict[str, int]]) -> tuple[str, ...]:
    works = {
        "generate": "rollout" in here,
        "teacher": "teacher" in here or ("student" in here and case.needs.reference),
        "train": "student" in here,
        "refit": "student" in here or "rollout" in here,
    }
    return tuple(phase for phase in phases if not works[phase])


def _phases(case: Case, here: dict[str, int]) -> dict[str, dict[str, int]]:
    resident = _resident(case, here)
    awake = _engine_items(engine(case, "student")) if "rollout" in here else {}
    found: dict[str, dict[str, int]] = {}
    if not case.engine_sleeps:
        resident, awake = resident | awake, {}
    if case.generates:
        found["generate"] = resident | awake
    if case.reads_teacher or case.needs.reference:
        found["teacher"] = resident | _scoring(case, here)
        if case.offloads_teacher:
            found["teacher"]["teacher"] = _stages(case, "teacher")[here["teacher"]].num_bytes
    found["train"] = resident | (_training(case, here["student"]) if "student" in here else {})
    if case.generates:
        found["refit"] = resident | awake | _refit(case, here)
    return {
        phase: {what: size for what, size in items.items() if size}
        for phase, items in found.items()
    }


def _resident(case: Case, here: dict[str, int]) -> dict[str, int]:
    items = dict.fromkeys(("parameters", "gradients", "optimizer", "routing"), 0)
    if "student" in here:
        held = _trained(case, here["student"])
        items |= {
            "parameters": held.parameters,
            "gradients": held.gradients,
            "optimizer": held.optimizer,
        }
        passes = 1 + case.needs.reference + case.needs.process
        items["routing"] = _routing(case, "student", here["student"]) * passes
    if "teacher" in here:
        items["routing"] += _routing(case, "teacher", here["teacher"])
        if not case.offloads_teacher:
            items["teacher"] = _stages(case, "teacher")[here["teacher"]].num_bytes
    if "student" in here:
        items |= _beside_the_student(case, here["student"], items)
    return items


def _beside_the_student(case: Case, stage: int, items: dict[str, int]) -> dict[str, int]:
    """Models that a method has beside it, never on processes of their own."""
    found = {}
    if case.needs.reference:
        found["reference"] = _stages(case, "student")[stage].num_bytes
    if case.needs.process:
        found["process model"] = sum(
            items[each] for each in ("parameters", "gradients", "optimizer")
        )
    if case.config.method.teacher_share:  # an engine of its own, which does not sleep
        found["teacher engine"] = engine(case, "teacher").total
    return found


def _routing(case: Case, name: str, stage: int) -> int:
    """What the layers hold of their last pass, in whatever phase it was."""
    return _stages(case, name)[stage].num_layers * activations.routing(case.micro_batch(name))


def _stages(case: Case, name: str) -> list[Stage]:
    return stages(case.architectures[name], case.model(name).layout, case.config.precision)


def _trained(case: Case, stage: int) -> TrainedBytes:
    arch, layout = case.architectures["student"], case.config.student.layout
    return trained_stages(arch, layout, case.config.precision, case.stage_size("student"))[stage]


def _engine_items(held: EngineMemory) -> dict[str, int]:
    return {"engine": held.weights + held.workspace, "KV cache": max(held.cache, 0)}


def shortfall(case: Case, kinds: list[RankKind]) -> str | None:
    """Why the case does not fit: the rank and phase that lack most, or the engine. None where it
    fits."""
    limit = case.hardware.limit
    kind = max(kinds, key=lambda each: each.total(each.peak))
    total = kind.total(kind.peak)
    if total > limit:
        return f"rank {kind.first_rank}, {kind.peak}: {total / GIB:.1f} of {limit / GIB:.1f} GiB"
    if case.generates and engine(case, "student").sequences(case.config.max_sequence_length) == 0:
        return (
            f"engine: no room for the keys and values of {case.config.max_sequence_length} tokens"
        )
    return None


# --------------------------------------------------------------------------------------- the passes
def _scoring(case: Case, here: dict[str, int]) -> dict[str, int]:
    """The frozen models score one after the other; of each, layers and output layer do not add up
    either.

    The signals of a step's tokens, 3 + 2 k float32 numbers each, lie on every rank; those of a
    replica's share twice. Those of a teacher on processes of its own come through the host, as
    bytes and then as arrays.
    """
    models = [("teacher", case.needs.topk)] * ("teacher" in here)
    models += [("student", 0)] * ("student" in here and case.needs.reference)
    working, signals = 0, 0
    for name, topk in models:
        batch = case.micro_batch(name)
        working = max(working, activations.forward(batch), activations.head_scoring(batch))
        numbers = case.signals(topk)
        signals = max(signals, FLOAT32 * (numbers + numbers // case.replicas(name)))
    if case.config.teacher_processes and "student" in here and not case.hardware.is_cuda:
        signals = max(signals, 2 * FLOAT32 * case.signals(case.needs.topk))
    return {"activations": working, "signals": signals}


def in_flight(case: Case, stage: int) -> int:
    """Passes of a micro-batch through a model chunk that a stage keeps activations of: 1F1B,
    interleaved or not."""
    layout = case.config.student.layout
    pipeline, chunks = (
        layout.pipeline_model_parallel_size,
        layout.virtual_pipeline_model_parallel_size,
    )
    passes = chunks * case.micro_batches("student", case.samples_per_update)
    return min(
        pipeline - stage
        if chunks == 1
        else 2 * (pipeline - stage - 1) + (chunks - 1) * pipeline + 1,
        passes,
    )


def _training(case: Case, stage: int) -> dict[str, int]:
    """The larger of the backward pass and the update, which do not meet."""
    batch, held = case.micro_batch("student"), _stages(case, "student")[stage]
    layout, granularity = case.config.student.layout, case.config.train.recompute_granularity
    first, last = stage == 0, stage == layout.pipeline_model_parallel_size - 1
    layers = held.num_layers // layout.virtual_pipeline_model_parallel_size
    saved = activations.stage_saved(batch, layers, granularity, first=first, last=last) * in_flight(
        case, stage
    )
    working = activations.layer_training(batch, held.largest_of_layer) + activations.recomputed(
        batch, granularity
    )
    if first and last and batch.arch.tie_word_embeddings:
        # the output layer's gradient waits for the embedding's
        working += batch.output_weight * batch.element
    if last:
        head = activations.head_training(batch, fused=case.config.train.fused_output_layer)
        if case.needs.teacher_head:
            teacher = case.micro_batch("teacher")
            head += activations.divergence_training(batch) + activations.forward(teacher)
        working = max(working, head)
    update = _update_buffers(case, stage)
    if update > saved + working:
        return {"update": update}
    return {"activations": saved, "working memory": working}


def _update_buffers(case: Case, stage: int) -> int:
    """Adam's temporary: on CUDA torch takes all tensors at once, on the host one by one (less than
    any pass)."""
    elements = _trained(case, stage).optimizer // state_bytes(case.element)
    return elements * FLOAT32 if case.hardware.is_cuda else 0


def _refit(case: Case, here: dict[str, int]) -> dict[str, int]:
    """Bytes in the refit: beside the student, the largest tensor on its way.

    Beside an engine alone, what arrives of a module until vLLM has it whole, and the module that is
    filled with it before the engine's own takes its values.
    """
    if "student" in here:
        return {"gathered weights": _gathered(case)}
    module = _largest_module(case.architectures["student"]) * case.element
    return {"received weights": 2 * module} if "rollout" in here else {}


def _gathered(case: Case) -> int:
    """The ranks' parts, and the whole; of an expert of another rank the whole."""
    arch, layout = case.architectures["student"], case.config.student.layout
    tp, pp, ep = (
        layout.tensor_model_parallel_size,
        layout.pipeline_model_parallel_size,
        layout.expert_model_parallel_size,
    )
    shared = _largest_tensor(arch, of_expert=False) * ((tp > 1) + (tp * pp > 1))
    return case.element * max(shared, _largest_tensor(arch, of_expert=True) * (ep * pp > 1))


@functools.cache
def _largest_tensor(arch: Architecture, *, of_expert: bool) -> int:
    """Elements."""
    chosen = [entry for entry in weight_table(arch) if (entry.expert is not None) == of_expert]
    return max((math.prod(entry.full_shape) for entry in chosen), default=0)


def _largest_module(arch: Architecture) -> int:
    """Elements of vLLM's: it joins what we join, and all experts of a layer."""
    experts = arch.experts
    of_experts = 3 * experts.count * experts.intermediate_size * arch.hidden_size if experts else 0
    return max(of_experts, _largest_tensor(arch, of_expert=False))
