"""The order in which a run draws its tasks."""

from collections.abc import Sequence

import numpy as np

from megatron_opd.contracts.rows import Task
from megatron_opd.errors import DataError


class TaskSource:
    """Draws tasks without end: every epoch is a permutation that depends on (seed, epoch) alone.

    The state is therefore two integers, and a resumed run draws the tasks of an uninterrupted one.
    A draw may cross the border of an epoch, and may be larger than the data set.
    """

    def __init__(self, tasks: Sequence[Task], *, seed: int, shuffle: bool) -> None:
        if not tasks:
            raise DataError("data.train: there are no prompts to draw from")
        self._prompts = tasks
        self._seed = seed
        self._shuffle = shuffle
        self._start_epoch(0, position=0)

    def next(self, n: int) -> list[Task]:
        """The next n tasks."""
        drawn = []
        for _ in range(n):
            if self._position == len(self._prompts):
                self._start_epoch(self._epoch + 1, position=0)
            drawn.append(self._prompts[self._order[self._position]])
            self._position += 1
        return drawn

    def state_dict(self) -> dict[str, int]:
        """The cursor, with the keys "epoch" and "position"."""
        return {"epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on from a cursor. Raises DataError when it does not fit the data set."""
        if not 0 <= state["position"] <= len(self._prompts):
            raise DataError(
                f"data.train: the checkpoint stands at prompt {state['position']} of an epoch, the "
                f"data set now has {len(self._prompts)}; resume with the data set the run was "
                "started with"
            )
        self._start_epoch(state["epoch"], position=state["position"])

    def _start_epoch(self, epoch: int, position: int) -> None:
        self._epoch = epoch
        self._position = position
        self._order = np.arange(len(self._prompts))
        if self._shuffle:
            generator = np.random.default_rng([self._seed % 2**32, epoch])
            self._order = generator.permutation(self._order)
