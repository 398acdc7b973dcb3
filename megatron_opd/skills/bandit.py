"""A bandit over a bank's categories, one for every kind of task."""

import math
from collections.abc import Sequence

from megatron_opd.contracts.skills import Pull


class Bandit:
    """UCB1: argmax of mean + exploration sqrt(ln N / n), what was never tried first.

    N counts the pulls of a kind of task, n those of one arm. What is chosen within a step depends
    on the pulls of earlier steps alone, so that processes with different tasks agree.
    """

    def __init__(self, arms: Sequence[str], exploration: float) -> None:
        self._arms = tuple(arms)
        self._exploration = exploration
        self._counts: dict[str, dict[str, int]] = {}
        self._sums: dict[str, dict[str, float]] = {}

    def choose(self, task_type: str, turn: int) -> str:
        """The arm for a task; `turn`, a number of the group, decides among equally good ones."""
        counts = self._counts.get(task_type, {})
        equal = [arm for arm in self._arms if not counts.get(arm)]
        if not equal:
            bounds = {arm: self._bound(task_type, arm) for arm in self._arms}
            highest = max(bounds.values())
            equal = [arm for arm, bound in bounds.items() if bound == highest]
        return equal[turn % len(equal)]

    def learn(self, pulls: Sequence[Pull]) -> None:
        for task_type, arm, reward in pulls:
            counts = self._counts.setdefault(task_type, {})
            sums = self._sums.setdefault(task_type, {})
            counts[arm] = counts.get(arm, 0) + 1
            sums[arm] = sums.get(arm, 0.0) + reward

    def state_dict(self) -> dict[str, object]:
        return {
            task_type: {arm: [count, self._sums[task_type][arm]] for arm, count in counts.items()}
            for task_type, counts in self._counts.items()
        }

    def load_state_dict(self, state: dict[str, object]) -> None:
        self._counts = {}
        self._sums = {}
        for task_type, arms in state.items():
            assert isinstance(arms, dict)
            # A bank that has lost a category since goes on without it.
            kept = {arm: pair for arm, pair in arms.items() if arm in self._arms}
            self._counts[task_type] = {arm: int(count) for arm, (count, _) in kept.items()}
            self._sums[task_type] = {arm: float(total) for arm, (_, total) in kept.items()}

    def _bound(self, task_type: str, arm: str) -> float:
        counts = self._counts[task_type]
        mean = self._sums[task_type][arm] / counts[arm]
        tried = math.log(sum(counts.values())) / counts[arm]
        return mean + self._exploration * math.sqrt(tried)
