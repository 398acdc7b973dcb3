"""The teacher that a recipe asks for: a model of its own, or the student itself."""

from dataclasses import dataclass
from typing import assert_never

from megatron_opd.contracts.stations import Teacher
from megatron_opd.methods.part import Needs
from megatron_opd.recipe.agents import SelfTeacherConfig
from megatron_opd.recipe.keys import RunConfig
from megatron_opd.runs.models import frozen, load_teacher
from megatron_opd.teacher.privileged import PrivilegedHead, PrivilegedTeacher
from megatron_opd.teacher.remote import RemoteTeacher
from megatron_opd.teacher.score import MegatronTeacher, Scorer
from megatron_opd.trainer.step import TeacherHead
from megatron_opd.trainer.student import Student
from megatron_opd.trainer.weight_copy import WeightCopy
from megatron_opd.world import processes


@dataclass(frozen=True)
class Guide:
    """A teacher, what terms on the whole vocabulary read of it, and the weights that follow the
    student; None where there is no such thing."""

    teacher: Teacher | None = None
    head: TeacherHead | None = None
    copy: WeightCopy | None = None


def open_guide(
    config: RunConfig, needs: Needs, student: Student, reference: MegatronTeacher | None
) -> Guide:
    """The recipe's teacher, if a term reads one. Collective over the student's world.

    `reference` is the student as the run found it, where a term reads that.
    """
    if not (needs.teacher or needs.teacher_head):
        return Guide()
    copy = None
    teacher: Scorer | RemoteTeacher
    if config.self_teacher:
        teacher, copy = _self_teacher(config, config.self_teacher, student, reference)
    else:
        channel = processes.channel("teacher")
        teacher = RemoteTeacher(channel, config) if channel else load_teacher(config)
    in_process = teacher if needs.teacher_head and isinstance(teacher, Scorer) else None
    if config.skills and config.skills.reader == "teacher":
        head = PrivilegedHead(in_process) if in_process else None
        return Guide(PrivilegedTeacher(teacher), head, copy)
    return Guide(teacher, in_process.head if in_process else None, copy)


def _self_teacher(
    config: RunConfig,
    settings: SelfTeacherConfig,
    student: Student,
    reference: MegatronTeacher | None,
) -> tuple[Scorer, WeightCopy | None]:
    """The student as its own teacher, and the copy of its weights that must follow it."""
    match settings.weights:
        case "present":
            scorer = Scorer(
                student.chunks,
                student.arch,
                student.parallel,
                student_vocab_size=student.arch.vocab_size,
                micro_batch_tokens=config.train.micro_batch_tokens,
                temperature=config.rollout.temperature,
            )
            return scorer, None
        case "first":
            return reference or frozen(config, config.student), None
        case "every" | "average":
            model = frozen(config, config.student)
            return model, WeightCopy(model.chunks, student, settings)
        case _:
            assert_never(settings.weights)
