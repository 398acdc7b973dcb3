"""Every layout that the recipe's checks accept on a cluster, with its memory and estimated time."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_opd.architectures.config import LayoutConfig
from megatron_opd.errors import ConfigError
from megatron_opd.planning.case import Case
from megatron_opd.planning.memory import RankKind, rank_kinds, shortfall
from megatron_opd.planning.step_time import StepTime, step_time


@dataclass(frozen=True)
class Candidate:
    """A layout of each model, with its memory and time."""

    student: LayoutConfig
    teacher: LayoutConfig | None
    kinds: list[RankKind]
    time: StepTime
    lacks: str | None  # None if it fits

    @property
    def peak(self) -> int:
        """Bytes of the fullest rank in its fullest phase."""
        return max(kind.total(kind.peak) for kind in self.kinds)

    @property
    def train(self) -> int:
        """Bytes of the fullest rank that trains, while it does."""
        return max(kind.total("train") for kind in self.kinds if "student" in kind.stages)


def candidate(case: Case) -> Candidate:
    """The candidate of the case's own layouts."""
    teacher = case.config.teacher.layout if case.config.teacher and case.reads_teacher else None
    kinds = rank_kinds(case)
    return Candidate(
        student=case.config.student.layout,
        teacher=teacher,
        kinds=kinds,
        time=step_time(case),
        lacks=shortfall(case, kinds),
    )


def candidates(case: Case) -> list[Candidate]:
    """All candidates that are accepted, the fastest first, of equally fast ones the smallest.

    Tensor parallelism stays within a node; expert parallelism and stages may span several. Context
    parallelism is the recipe's, and so are the numbers of processes set aside for a role.
    """
    students = _accepted_students(case)
    teachers: list[LayoutConfig | None] = [None]
    if case.config.teacher and case.reads_teacher:
        teachers = [*_accepted_teachers(case, students)]
    both_matter = case.needs.teacher_head  # otherwise a pair is right if each of the two is
    accepted = []
    for student in students:
        for teacher in teachers:
            changed = case.with_layouts(student, teacher)
            if not both_matter or _accepted(changed):
                accepted.append(candidate(changed))
    return sorted(accepted, key=lambda layouts: (layouts.time.total, layouts.peak, layouts.train))


def _accepted_students(case: Case) -> list[LayoutConfig]:
    """The student's layouts that are accepted beside the teacher's smallest."""
    teacher = case.config.teacher
    smallest = None
    if teacher:
        smallest = LayoutConfig(context_parallel_size=teacher.layout.context_parallel_size)
    layouts = _layouts(case, "student")
    return [layout for layout in layouts if _accepted(case.with_layouts(layout, smallest))]


def _accepted_teachers(case: Case, students: list[LayoutConfig]) -> list[LayoutConfig]:
    """The teacher's layouts that are accepted beside the student's first."""
    if not students:
        return []
    layouts = _layouts(case, "teacher")
    return [layout for layout in layouts if _accepted(case.with_layouts(students[0], layout))]


def _accepted(case: Case) -> bool:
    try:
        case.check()
    except ConfigError:
        return False
    return True


def _layouts(case: Case, name: str) -> Iterator[LayoutConfig]:
    """The layouts of a model that its role's ranks and its own sizes allow."""
    arch = case.architectures[name]
    gpus = case.gpus_of(name)
    context = case.model(name).layout.context_parallel_size
    tensor = _divisors(min(gpus, case.gpus_per_node))
    experts = _divisors(arch.experts.count if arch.experts else 1)
    for tp, pp, ep in itertools.product(tensor, _divisors(gpus), experts):
        if tp * pp * context > gpus or ep * pp > gpus or arch.num_layers % pp:
            continue
        yield LayoutConfig(tp, pp, False, ep, context_parallel_size=context)
        if tp > 1:
            yield LayoutConfig(tp, pp, True, ep, context_parallel_size=context)


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
