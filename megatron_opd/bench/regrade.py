"""Stored samples graded anew, without sampling again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_opd.contracts.suites import Answer, Asked, GradedSample, Grader, Question
from megatron_opd.errors import DataError


@dataclass(frozen=True)
class Changed:
    """A sample whose verdict is another one now."""

    before: GradedSample
    after: GradedSample


def regrade(
    samples: Sequence[GradedSample], questions: Mapping[str, Question], grader: Grader
) -> tuple[list[GradedSample], list[Changed]]:
    """All samples of one suite with new verdicts, and those that changed, in their order.

    `questions` are the suite's by key. The gold answer and the order of options are those that the
    sample was asked with, so that no shuffle is repeated. Raises DataError for a sample whose
    question is not among them.
    """
    answers = [_answer(one, questions) for one in samples]
    verdicts = grader.grade(answers)
    graded = [replace(one, verdict=verdict) for one, verdict in zip(samples, verdicts, strict=True)]
    changed = [
        Changed(before, after)
        for before, after in zip(samples, graded, strict=True)
        if before.verdict != after.verdict
    ]
    return graded, changed


def _answer(one: GradedSample, questions: Mapping[str, Question]) -> Answer:
    if one.key not in questions:
        raise DataError(
            f"{one.suite}: question {one.key} of the samples is not in the data; name the data "
            "that the samples were asked from"
        )
    asked = Asked(questions[one.key], one.sample, one.prompt, one.gold, one.order)
    return Answer.to(one.prompt, asked, one.text, truncated=one.truncated)
