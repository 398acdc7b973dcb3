"""A teacher that reads, with every prompt, the privileged text that the student did not."""

from collections.abc import Sequence
from dataclasses import replace

from megatron_opd.contracts.rows import Row
from megatron_opd.contracts.signals import TeacherSignals
from megatron_opd.contracts.stations import Teacher
from megatron_opd.mcore.batch import MicroBatch, one_micro_batch
from megatron_opd.mcore.head import Head
from megatron_opd.teacher.score import Scorer


class PrivilegedTeacher:
    """A teacher of rows with their privileged prompts; a row without one keeps its own.

    The completions stay as they are, and so does the order of their tokens.
    """

    def __init__(self, inner: Teacher) -> None:
        self._inner = inner

    def score(self, rows: Sequence[Row], topk: int = 0) -> TeacherSignals:
        return self._inner.score(with_privileged_prompts(rows), topk)


class PrivilegedHead:
    """The head of a model that reads the privileged prompts, for whole distributions.

    Without pipeline stages and context parallelism: the prompts are longer than the student's, so
    other ranks would hold other tokens.
    """

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer

    def __call__(self, batch: MicroBatch) -> Head:
        """The head at the positions that predict the completion tokens of a micro-batch."""
        rows = with_privileged_prompts(batch.rows)
        return self._scorer.head(one_micro_batch(rows, self._scorer.parallel))


def with_privileged_prompts(rows: Sequence[Row]) -> list[Row]:
    """The rows as the teacher reads them."""
    return [
        row if row.privileged_ids is None else replace(row, prompt_ids=row.privileged_ids)
        for row in rows
    ]
