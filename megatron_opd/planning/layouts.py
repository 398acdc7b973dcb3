"""Every layout that the recipe's checks accept on a cluster, with its memory and its estimated
time."""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_opd.architectures.config import LayoutConfig
from megatron_opd.errors import ConfigError
from megatron_opd.planning.case import Case
from megatron_opd.planning.memory import RankKind, rank_kinds, shortfall
from megatron_opd.planning.step_time import StepTime, step_time


@dataclass(frozen=True)
class Candidate:
    student: LayoutConfig
    teacher: LayoutConfig | None
    kinds: list[RankKind]
    time: StepTime
    lacks: str | None  # None: it fits

    @property
    def peak(self) -> int:
        return max(kind.total(kind.peak) for kind in self.kinds)

    @property
    def train(self) -> int:
        """Bytes of the fullest rank that trains, while it does."""
        return max(kind.total("train") for kind in self.kinds if "student" in kind.stages)


def candidate(case: Case) -> Candidate:
    """The case as it is."""
    teacher = case.config.teacher.layout if case.config.teacher and case.reads_teacher else None
    kinds = rank_kinds(case)
    return Candidate(
        case.config.student.layout, teacher, kinds, step_time(case), shortfall(case, kinds)
    )


def candidates(case: Case) -> list[Candidate]:
    """Fastest first; of equally fast ones that which needs less.

    Tensor parallelism stays within a node; expert parallelism and stages may span several. Context
    parallelism is the recipe's, and so are the numbers of processes set aside for a role.
    """
    judge = case.config.teacher
    smallest = (
        LayoutConfig(context_parallel_size=judge.layout.context_parallel_size) if judge else None
    )
    students = [
        each for each in _layouts(case, "student") if _accepted(case.with_layouts(each, smallest))
    ]
    teachers: list[LayoutConfig | None] = [None]
    if case.reads_teacher:
        accepted = students[:1]
        teachers = [
            t
            for t in _layouts(case, "teacher")
            if any(_accepted(case.with_layouts(s, t)) for s in accepted)
        ]
    both_matter = case.needs.teacher_head  # else a pair is right where each of the two is
    found = []
    for student in students:
        for teacher in teachers:
            changed = case.with_layouts(student, teacher)
            if not both_matter or _accepted(changed):
                found.append(candidate(changed))
    return sorted(found, key=lambda each: (each.time.total, each.peak, each.train))


def _accepted(case: Case) -> bool:
    try:
        case.check()
    except ConfigError:
        return False
    return True


def _layouts(case: Case, name: str) -> Iterator[LayoutConfig]:
    arch, gpus, context = (
        case.architectures[name],
        case.gpus_of(name),
        case.model(name).layout.context_parallel_size,
    )
    experts = arch.experts.count if arch.experts else 1
    for tp in _divisors(min(gpus, case.gpus_per_node)):
        for pp in _divisors(gpus):
            for ep in _divisors(experts):
                if tp * pp * context <= gpus and ep * pp <= gpus and arch.num_layers % pp == 0:
                    for sequence_parallel in (False, True)[: 1 + (tp > 1)]:
                        yield LayoutConfig(
                            tp, pp, sequence_parallel, ep, context_parallel_size=context
                        )


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]
