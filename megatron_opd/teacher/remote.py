"""A teacher in processes of its own: the student's side, and the loop of those processes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_opd.contracts.rows import Row
from megatron_opd.contracts.signals import TeacherSignals
from megatron_opd.recipe.keys import RunConfig
from megatron_opd.teacher.score import MegatronTeacher
from megatron_opd.world.channel import Channel


@dataclass(frozen=True)
class _Load:
    config: RunConfig


@dataclass(frozen=True)
class _Score:
    teacher: int  # its number among those that were loaded
    rows: Sequence[Row]
    topk: int


class RemoteTeacher:
    """The teacher of `config`, loaded and asked across the channel.

    Collective over the student's processes. Raises the exceptions of loading it.
    """

    def __init__(self, channel: Channel, config: RunConfig) -> None:
        self._channel = channel
        self._number: int = channel.ask(_Load(config))

    def score(self, rows: Sequence[Row], topk: int = 0) -> TeacherSignals:
        """The signals of `Teacher.score`. Collective over the student's processes."""
        return self._channel.ask(_Score(self._number, rows, topk))


def serve(channel: Channel, load: Callable[[RunConfig], MegatronTeacher]) -> None:
    """The loop of the teacher's processes: answers `RemoteTeacher` until the student's end."""
    teachers: list[MegatronTeacher] = []

    def answer(question: _Load | _Score) -> int | TeacherSignals:
        if isinstance(question, _Load):
            teachers.append(load(question.config))
            return len(teachers) - 1
        return teachers[question.teacher].score(question.rows, question.topk)

    channel.serve(answer)
