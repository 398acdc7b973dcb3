"""Bytes of every rank in every phase of a step.

The student's parameters, gradients and optimizer state, frozen models and, on the host, the engine
are always resident. On CUDA the engine sleeps except in `generate` and `refit`, when it has its
whole share of the device. A role with processes of its own is resident there and nowhere else; the
other roles keep their memory while they wait.
"""

import functools
import itertools
import math
from dataclasses import dataclass
from typing import assert_never

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
    """Ranks of equal contents: one stage of each model that lies there."""

    stages: dict[str, int]  # role -> stage; an engine is one stage
    first_rank: int
    ranks: int
    phases: dict[str, dict[str, int]]  # phase -> item -> bytes, without items of 0 bytes
    idle: tuple[str, ...]  # phases in which the ranks wait for those of another role

    def total(self, phase: str) -> int:
        """Bytes in a phase."""
        return sum(self.phases[phase].values())

    @property
    def peak(self) -> str:
        """The phase with most bytes."""
        return max(self.phases, key=self.total)


def rank_kinds(case: Case) -> list[RankKind]:
    """The kinds of ranks, in order of their first ranks.

    Replicas' shards differ by padding; the fullest counts for all.
    """
    places = [(role, case.ranks_of(role), case.stage_size(role)) for role in case.roles]
    starts = {start for _, ranks, size in places for start in ranks[::size]}
    kinds = []
    for first, end in itertools.pairwise(sorted({*starts, case.gpus})):
        own = {}
        for role, ranks, size in places:
            if first in ranks:
                own[role] = (first - ranks.start) // size
        phases = _phases(case, own)
        kinds.append(RankKind(own, first, end - first, phases, _idle(case, own, phases)))
    return kinds


def _idle(case: Case, own: dict[str, int], phases: dict[str, dict[str, int]]) -> tuple[str, ...]:
    works = {
        "generate": "rollout" in own,
        "teacher": "teacher" in own or ("student" in own and case.needs.reference),
        "train": "student" in own,
        "refit": "student" in own or "rollout" in own,
    }
    return tuple(phase for phase in phases if not works[phase])


def _phases(case: Case, own: dict[str, int]) -> dict[str, dict[str, int]]:
    """Items and their bytes by phase, on ranks that have the roles' stages `own`."""
    resident = _resident(case, own)
    awake = _engine_items(engine(case, "student")) if "rollout" in own else {}
    phases: dict[str, dict[str, int]] = {}
    if not case.engine_sleeps:
        resident = resident | awake
        awake = {}
    if case.generates:
        phases["generate"] = resident | awake
    if case.reads_teacher or case.needs.reference:
        phases["teacher"] = resident | _scoring(case, own)
        if case.offloads_teacher:
            phases["teacher"]["teacher"] = _stages(case, "teacher")[own["teacher"]].num_bytes
    phases["train"] = resident | (_training(case, own["student"]) if "student" in own else {})
    if case.generates:
        phases["refit"] = resident | awake | _refit(case, own)
    return {phase: _without_zeros(items) for phase, items in phases.items()}


def _without_zeros(items: dict[str, int]) -> dict[str, int]:
    return {item: size for item, size in items.items() if size}


def _resident(case: Case, own: dict[str, int]) -> dict[str, int]:
    items = dict.fromkeys(("parameters", "gradients", "optimizer", "routing"), 0)
    if "student" in own:
        trained = _trained(case, own["student"])
        items["parameters"] = trained.parameters
        items["gradients"] = trained.gradients
        items["optimizer"] = trained.optimizer
        passes = 1 + case.needs.reference + case.needs.process
        items["routing"] = _routing(case, "student", own["student"]) * passes
    if "teacher" in own:
        items["routing"] += _routing(case, "teacher", own["teacher"])
        if not case.offloads_teacher:
            items["teacher"] = _teacher(case, own["teacher"])
    if "student" in own:
        items |= _beside_the_student(case, own["student"], items)
    return items


def _teacher(case: Case, stage: int) -> int:
    """Bytes of a teacher. One that is the student itself may be no copy, or two."""
    copy = _stages(case, "teacher")[stage].num_bytes
    if case.config.self_teacher is None:
        return copy
    match case.config.self_teacher.weights:
        case "present":
            return 0
        case "first":
            return 0 if case.needs.reference else copy  # it is the reference
        case "every":
            return copy
        case "average":
            return copy + copy // case.element * FLOAT32  # kept in float32 beside it
        case weights:
            assert_never(weights)


def _beside_the_student(case: Case, stage: int, items: dict[str, int]) -> dict[str, int]:
    """A method's models beside the student, never on processes of their own."""
    models = {}
    if case.needs.reference:
        models["reference"] = _stages(case, "student")[stage].num_bytes
    if case.needs.process:
        models["process model"] = items["parameters"] + items["gradients"] + items["optimizer"]
    if case.config.method.teacher_share:  # its own engine, which does not sleep
        models["teacher engine"] = engine(case, "teacher").total
    return models


def _routing(case: Case, name: str, stage: int) -> int:
    """Bytes that a stage's layers keep of their last pass, in any phase."""
    return _stages(case, name)[stage].num_layers * activations.routing(case.micro_batch(name))


def _stages(case: Case, name: str) -> list[Stage]:
    return stages(case.architecture(name), case.model(name).layout, case.config.precision)


def _trained(case: Case, stage: int) -> TrainedBytes:
    arch = case.architectures["student"]
    layout = case.config.student.layout
    return trained_stages(arch, layout, case.config.precision, case.stage_size("student"))[stage]


def _engine_items(memory: EngineMemory) -> dict[str, int]:
    return {"engine": memory.weights + memory.workspace, "KV cache": max(memory.cache, 0)}


def shortfall(case: Case, kinds: list[RankKind]) -> str | None:
    """The reason why the case does not fit: the rank and phase that lack most, or the engine.

    None if it fits.
    """
    limit = case.hardware.limit
    kind = max(kinds, key=lambda kind: kind.total(kind.peak))
    total = kind.total(kind.peak)
    if total > limit:
        return f"rank {kind.first_rank}, {kind.peak}: {total / GIB:.1f} of {limit / GIB:.1f} GiB"
    if case.generates and engine(case, "student").sequences(case.config.max_sequence_length) == 0:
        return (
            f"engine: no room for the keys and values of {case.config.max_sequence_length} tokens"
        )
    return None


# --------------------------------------------------------------------------------------- the passes
def _scoring(case: Case, own: dict[str, int]) -> dict[str, int]:
    """Bytes of frozen models that score, one after the other.

    A model's layers and its output layer do not work at the same time either. Every rank has the
    signals of a step's tokens, 3 + 2 k float32 numbers for a token, and those of its replica's
    share twice. The signals of a teacher on processes of its own come through the host, as bytes
    and then as arrays.
    """
    models = []
    if "teacher" in own:
        models.append(("teacher", case.needs.topk))
    if "student" in own and case.needs.reference:
        models.append(("student", 0))
    working = 0
    signals = 0
    for name, topk in models:
        batch = case.micro_batch(name)
        working = max(working, activations.forward(batch), activations.head_scoring(batch))
        numbers = case.signals(topk)
        signals = max(signals, FLOAT32 * (numbers + numbers // case.replicas(name)))
    if case.config.teacher_processes and "student" in own and not case.hardware.is_cuda:
        signals = max(signals, 2 * FLOAT32 * case.signals(case.needs.topk))
    return {"activations": working, "signals": signals}


def in_flight(case: Case, stage: int) -> int:
    """The number of a micro-batch's passes through a chunk that a stage keeps activations of.

    The schedule is 1F1B, interleaved if a rank has several chunks.
    """
    layout = case.config.student.layout
    pipeline = layout.pipeline_model_parallel_size
    chunks = layout.virtual_pipeline_model_parallel_size
    passes = chunks * case.micro_batches("student", case.samples_per_update)
    if chunks == 1:
        return min(pipeline - stage, passes)
    return min(2 * (pipeline - stage - 1) + (chunks - 1) * pipeline + 1, passes)


def _training(case: Case, stage: int) -> dict[str, int]:
    """Bytes of the backward pass or the update, whichever needs more: one follows the other."""
    batch = case.micro_batch("student")
    model = _stages(case, "student")[stage]
    layout = case.config.student.layout
    granularity = case.config.train.recompute_granularity
    first = stage == 0
    last = stage == layout.pipeline_model_parallel_size - 1
    layers = model.num_layers // layout.virtual_pipeline_model_parallel_size
    per_pass = activations.stage_saved(batch, layers, granularity, first=first, last=last)
    saved = per_pass * in_flight(case, stage)
    working = activations.layer_training(batch, model.largest_of_layer)
    working += activations.recomputed(batch, granularity)
    if first and last and batch.arch.tie_word_embeddings:
        # The output layer's gradient waits for the embedding's.
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
    """Bytes of Adam's temporary, which on CUDA is for all tensors at once.

    On the host it is for one after the other, less than a pass needs.
    """
    elements = _trained(case, stage).optimizer // state_bytes(case.element)
    return elements * FLOAT32 if case.hardware.is_cuda else 0


def _refit(case: Case, own: dict[str, int]) -> dict[str, int]:
    """Bytes in the refit: beside the student, the largest tensor on its way.

    An engine on processes of its own keeps the tensors of a module until vLLM has it whole, and
    fills a module with them, whose values the engine's own then takes.
    """
    if "student" in own:
        return {"gathered weights": _gathered(case)}
    module = _largest_module(case.architectures["student"]) * case.element
    return {"received weights": 2 * module} if "rollout" in own else {}


def _gathered(case: Case) -> int:
    """Bytes of a tensor and of all ranks' slices of it; another rank's expert comes whole."""
    arch = case.architectures["student"]
    layout = case.config.student.layout
    tp = layout.tensor_model_parallel_size
    pp = layout.pipeline_model_parallel_size
    ep = layout.expert_model_parallel_size
    shared = _largest_tensor(arch, of_expert=False) * ((tp > 1) + (tp * pp > 1))
    return case.element * max(shared, _largest_tensor(arch, of_expert=True) * (ep * pp > 1))


@functools.cache
def _largest_tensor(arch: Architecture, *, of_expert: bool) -> int:
    """The number of elements of the largest tensor, of an expert or not."""
    chosen = [entry for entry in weight_table(arch) if (entry.expert is not None) == of_expert]
    return max((math.prod(entry.full_shape) for entry in chosen), default=0)


def _largest_module(arch: Architecture) -> int:
    """The number of elements of vLLM's largest module, which joins all experts of a layer."""
    experts = arch.experts
    of_experts = 3 * experts.count * experts.intermediate_size * arch.hidden_size if experts else 0
    return max(of_experts, _largest_tensor(arch, of_expert=False))
