"""The grader of mathematics: the answer in the last box, judged in workers that can be killed."""

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Protocol

from megatron_opd.contracts.rows import NOT_JUDGED, Verdict
from megatron_opd.contracts.suites import Answer, Question
from megatron_opd.verify.answer import content_of, final_answer
from megatron_opd.verify.graders.reasoning import conclusion, no_answer

RULES = "1"  # of this grader; another number is another grader


class Judges(Protocol):
    """Workers that compare an answer with what it must be."""

    def replies(self, pairs: Sequence[tuple[str, str]]) -> list[str]:
        """The reason of a verdict for every pair; RunError where no worker starts."""


class MathGrader:
    """Judges the answers in boxes against gold answers."""

    def __init__(self, judges: Judges, options: Mapping[str, object]) -> None:
        """`options`: `relative_tolerance` of numbers, and `units` "ignored" or "compared"."""
        self._judges = judges
        self._options = dict(options)
        packages = ("math-verify", "latex2sympy2_extended", "sympy")
        self.versions: Mapping[str, str] = {
            "rules": RULES, **{name: version(name) for name in packages}
        }  # fmt: skip

    def grade(self, answers: Sequence[Answer]) -> list[Verdict]:
        """The verdicts in their order.

        Reasons: correct, wrong, no_answer, truncated (before an answer), bad_gold, too_long,
        timeout, over_budget, crashed, error. Raises RunError where no worker starts.
        """
        extracted = [_extracted(answer) for answer in answers]
        pairs = [
            (text, self._wanted(answer.asked.question))
            for answer, text in zip(answers, extracted, strict=True)
            if text is not None
        ]
        replies = iter(self._judges.replies(pairs))
        verdicts = []
        for answer, text in zip(answers, extracted, strict=True):
            reason = no_answer(answer) if text is None else next(replies)
            correct = None if reason in NOT_JUDGED else reason == "correct"
            verdicts.append(Verdict(float(reason == "correct"), correct, reason, text or ""))
        return verdicts

    def _wanted(self, question: Question) -> str:
        """What the worker compares an answer with; see items.Wanted."""
        return json.dumps({"gold": question.gold, **self._options, **question.details})


def _extracted(answer: Answer) -> str | None:
    """The content of the last box, or of boxes that are one answer; None without an answer."""
    text = conclusion(answer)
    boxed = None if text is None else final_answer(text, truncated=answer.truncated)
    return None if boxed is None else content_of(boxed)
