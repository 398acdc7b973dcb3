"""The held-out evaluations of a run: which problems were solved when, and what was answered."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_opd.errors import DataError
from megatron_opd.metrics.run_directory import Line, read_rollouts, rollout_files
from megatron_opd.statistics.paired import Difference, compare

# The words of a problem, and how many problems of the same words come before it.
Key = tuple[str, str, int]
_KEYS = ("prompt_index", "sample", "problem", "answer", "completion", "reward_reason")
_RIGHT = ("correct", "won")  # reasons, in files that do not say `correct`
_LEVEL = 0.05


@dataclass(frozen=True)
class Attempt:
    """An answer to a problem: the rows of its turns."""

    rows: list[Line]

    @property
    def failed(self) -> bool:
        """True when the environment failed, which says nothing of the model."""
        return self.rows[0].get("ended") == "failed"

    @property
    def right(self) -> bool:
        row = self.rows[0]
        return bool(row["correct"]) if "correct" in row else row["reward_reason"] in _RIGHT


@dataclass(frozen=True)
class Evaluation:
    """The attempts at every problem with the weights at the start of a step."""

    step: int
    attempts: dict[Key, list[Attempt]]

    def score(self, key: Key) -> float:
        """The fraction of a problem's attempts that are right."""
        return float(np.mean([attempt.right for attempt in self.attempts[key]]))

    def accuracy(self, keys: Sequence[Key]) -> float:
        return float(np.mean([self.score(key) for key in keys]))


@dataclass(frozen=True)
class Pair:
    """Two evaluations of the same problems, two or more."""

    first: Evaluation
    last: Evaluation
    keys: list[Key]  # the problems that both have
    difference: Difference

    @property
    def certain(self) -> bool:
        """True when both the test and the interval tell the two apart."""
        found = self.difference
        return found.p <= _LEVEL and (found.low > 0 or found.high < 0)


def read_ends(run_dir: Path) -> Pair | None:
    """The first and the last evaluation of a run; None where it has not two of the same problems.

    Raises DataError for a file that is not one of rows.
    """
    files = list(rollout_files(run_dir, "heldout").items())
    if len(files) < 2:
        return None
    return pair_of(*(read_evaluation(step, path) for step, path in (files[0], files[-1])))


def read_last(run_dir: Path) -> Evaluation | None:
    """The last evaluation of a run whose answers it has."""
    files = list(rollout_files(run_dir, "heldout").items())
    return read_evaluation(*files[-1]) if files else None


def read_evaluation(step: int, path: Path) -> Evaluation:
    """The attempts of a file, without those that an environment spoilt. Raises DataError."""
    by_sample: dict[tuple[int, int], list[Line]] = {}
    for row in read_rollouts(path):
        if missing := [key for key in _KEYS if key not in row]:
            raise DataError(f"{path}: a row has no `{missing[0]}`; delete the file")
        by_sample.setdefault((row["prompt_index"], row["sample"]), []).append(row)
    by_problem: dict[int, list[Attempt]] = {}
    for (index, _), rows in sorted(by_sample.items(), key=lambda item: item[0]):
        by_problem.setdefault(index, []).append(Attempt(rows))
    attempts: dict[Key, list[Attempt]] = {}
    seen: dict[tuple[str, str], int] = {}
    for of_problem in by_problem.values():
        row = of_problem[0].rows[0]
        words = (row["problem"], row["answer"])
        repeat = seen[words] = seen.get(words, -1) + 1
        usable = [attempt for attempt in of_problem if not attempt.failed]
        if usable:
            attempts[(*words, repeat)] = usable
    return Evaluation(step, attempts)


def pair_of(first: Evaluation, last: Evaluation) -> Pair | None:
    """The two on the problems that both have; None where these are fewer than two."""
    keys = [key for key in first.attempts if key in last.attempts]
    if len(keys) < 2:
        return None
    first_N, last_N = (np.array([one.score(key) for key in keys]) for one in (first, last))
    return Pair(first, last, keys, compare(first_N[:, None], last_N[:, None]))
