"""Rewards in a weighted sum: every row is graded by those that its source asks for."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from megatron_opd.contracts.rows import Row, Verdict
from megatron_opd.contracts.stations import Verifier
from megatron_opd.contracts.suites import REASONING_TAG, Answer, Asked, Grader, Question
from megatron_opd.methods.groups import overlong_penalty
from megatron_opd.recipe.rewards import LengthPenalty, Reward, grades
from megatron_opd.verify.columns import gold_letter, options_of, program_tests
from megatron_opd.verify.graders.maths import Judges
from megatron_opd.verify.replies import verdict_of, warn_of_errors

PENALTY = "length_penalty"  # its name among the verdicts of an episode


class RowGrader(Protocol):
    """Grades rows of any source. Local to a process."""

    def grade(self, rows: Sequence[Row]) -> list[Verdict]:
        """The verdicts in their order. An answer never raises; RunError where no judge starts."""


@dataclass(frozen=True)
class Weighted:
    """A reward and what grades it."""

    reward: Reward
    grader: RowGrader


class RewardSum:
    """A verifier of several rewards: the first that grades a row says whether it is right."""

    def __init__(
        self,
        rewards: Mapping[str, Weighted],
        penalty: LengthPenalty | None,
        max_completion_tokens: int,
    ) -> None:
        self._rewards = rewards
        self._penalty = penalty
        self._max_completion_tokens = max_completion_tokens

    def score(self, rows: Sequence[Row]) -> list[Row]:
        """The rows in their order with verdicts, those of every reward too, and their sum as
        `reward`; a row that none grades stays unscored. Raises RunError where no judge starts."""
        verdicts: list[dict[str, Verdict]] = [{} for _ in rows]
        for name, weighted in self._rewards.items():
            places = [
                place for place, row in enumerate(rows) if grades(weighted.reward, row.task.source)
            ]
            graded = weighted.grader.grade([rows[place] for place in places])
            for place, verdict in zip(places, graded, strict=True):
                verdicts[place][name] = verdict
        return [self._summed(row, of_row) for row, of_row in zip(rows, verdicts, strict=True)]

    def _summed(self, row: Row, verdicts: dict[str, Verdict]) -> Row:
        if not verdicts:  # refused before the run where a method reads rewards
            return row
        verdict = next(iter(verdicts.values()))
        reward = sum(self._rewards[name].reward.weight * v.score for name, v in verdicts.items())
        if self._penalty:
            score = self._length_score(row, self._penalty)
            verdicts[PENALTY] = Verdict(score, None, "length")
            reward += self._penalty.weight * score
        # one reward says all that its verdict does
        several = tuple(verdicts.items()) if len(verdicts) > 1 or len(self._rewards) > 1 else ()
        episode = replace(row.episode, verdict=verdict, verdicts=several, reward=reward)
        return replace(row, episode=episode)

    def _length_score(self, row: Row, penalty: LengthPenalty) -> float:
        lengths = np.array([row.num_written])
        return float(overlong_penalty(lengths, self._max_completion_tokens, penalty.overlong)[0])


class VerifierGrader:
    """The verdicts of another verifier."""

    def __init__(self, verifier: Verifier) -> None:
        self._verifier = verifier

    def grade(self, rows: Sequence[Row]) -> list[Verdict]:
        """The verifier's verdicts."""
        return [row.verdict for row in self._verifier.score(rows)]


class PatternGrader:
    """Whether a regular expression matches a whole response, in workers that can be killed."""

    def __init__(self, judges: Judges, pattern: str) -> None:
        self._judges = judges
        self._pattern = pattern

    def grade(self, rows: Sequence[Row]) -> list[Verdict]:
        """Reasons: correct, wrong, timeout, over_budget, crashed."""
        texts = [(REASONING_TAG if _opened(row) else "") + row.text for row in rows]
        replies = self._judges.replies([(text, self._pattern) for text in texts])
        return [verdict_of(reply) for reply in replies]


class FunctionGrader:
    """What a user's function returns, in workers that can be killed."""

    def __init__(self, judges: Judges) -> None:
        self._judges = judges

    def grade(self, rows: Sequence[Row]) -> list[Verdict]:
        """Reasons: correct, partly, wrong or the function's own, error, timeout, over_budget,
        crashed."""
        replies = self._judges.replies([(arguments_of(row), "") for row in rows])
        warn_of_errors(replies)
        return [verdict_of(reply) for reply in replies]


class ChoiceRows:
    """Which option a completion chooses, by the benchmarks' grader."""

    def __init__(self, grader: Grader, options_column: str) -> None:
        self._grader = grader
        self._options_column = options_column

    def grade(self, rows: Sequence[Row]) -> list[Verdict]:
        """The grader's verdicts; bad_gold for a row whose gold answer names no option."""
        answers = [self._answer(row) for row in rows]
        graded = iter(self._grader.grade([answer for answer in answers if answer]))
        unread = Verdict(0.0, None, "bad_gold")
        return [next(graded) if answer else unread for answer in answers]

    def _answer(self, row: Row) -> Answer | None:
        options = options_of(row.task.columns, self._options_column)
        gold = gold_letter(row.task.answer, options) if options else None
        if options is None or gold is None:
            return None
        question = Question(str(row.task.index), row.task.problem, gold, options)
        return _answered(row, question)


class CodeRows:
    """Whether a program passes its row's tests, by the benchmarks' grader."""

    def __init__(self, grader: Grader) -> None:
        self._grader = grader

    def grade(self, rows: Sequence[Row]) -> list[Verdict]:
        """The grader's verdicts; bad_gold for a row without tests that can be run."""
        questions = {}
        for task in {row.task.index: row.task for row in rows}.values():
            questions[task.index] = Question(
                str(task.index), task.problem, "", details=program_tests(task)
            )
        return self._grader.grade([_answered(row, questions[row.task.index]) for row in rows])


def _answered(row: Row, question: Question) -> Answer:
    order = tuple(range(len(question.options)))
    asked = Asked(question, row.sample, row.task.text, question.gold, order)
    return Answer.to(row.task.text, asked, row.text, truncated=row.truncated)


def arguments_of(row: Row) -> str:
    """The arguments of a user's function, as JSON: prompt, completion, row, tokens."""
    task = row.task
    arguments = [task.text, row.text, dict(task.columns), row.token_ids.tolist()]
    return json.dumps(arguments, default=str)


def _opened(row: Row) -> bool:
    """True where the prompt ends with the tag that opens the reasoning."""
    return row.task.text.rstrip().endswith(REASONING_TAG)
