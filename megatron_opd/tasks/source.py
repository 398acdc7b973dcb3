"""The order in which a run draws its tasks."""

import zlib
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from megatron_opd.contracts.rows import Task
from megatron_opd.errors import DataError


class TaskStream(Protocol):
    """What a run draws its tasks from, without end, as its state says."""

    def next(self, n: int) -> list[Task]: ...
    def state_dict(self) -> dict[str, int]: ...
    def load_state_dict(self, state: dict[str, int]) -> None: ...


class TaskSource:
    """Draws tasks without end: every epoch is a permutation that depends on (seed, epoch) alone.

    The state is therefore two integers, and a resumed run draws the tasks of an uninterrupted one.
    A draw may cross the border of an epoch, and may be larger than the data set.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        *,
        seed: int,
        shuffle: bool,
        ascending: int = 0,
        stream: Sequence[int] = (),
    ) -> None:
        """The first `ascending` epochs go from the lowest level to the highest; `stream`: of a part
        of a mixture, whose permutations are its own."""
        if not tasks:
            raise DataError("data.train: there are no prompts to draw from")
        self._prompts = tasks
        self._seed = seed
        self._shuffle = shuffle
        self._stream = tuple(stream)
        self._ascending = ascending
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

    @property
    def drawn(self) -> int:
        """The number of tasks drawn so far."""
        return self._epoch * len(self._prompts) + self._position

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
            generator = np.random.default_rng([self._seed % 2**32, epoch, *self._stream])
            self._order = generator.permutation(self._order)
        if epoch < self._ascending:
            levels = np.array([task.level for task in self._prompts])
            self._order = self._order[np.argsort(levels[self._order], kind="stable")]


class Mixture:
    """Draws from several parts by their weights, each in permutations of its own.

    The next task is of the part that is furthest below its share of all that was drawn, so that the
    shares hold within one task at every moment, without a random number. The state is the parts'.
    """

    def __init__(
        self,
        tasks: Mapping[str, Sequence[Task]],
        weights: Mapping[str, float],
        *,
        seed: int,
        shuffle: bool,
        ascending: int = 0,
    ) -> None:
        total = sum(weights.values())
        self._shares = {name: weight / total for name, weight in weights.items()}
        self._parts = {
            name: TaskSource(
                of_part,
                seed=seed,
                shuffle=shuffle,
                ascending=ascending,
                stream=(zlib.crc32(name.encode()),),
            )
            for name, of_part in tasks.items()
        }

    def next(self, n: int) -> list[Task]:
        """The next n tasks."""
        return [task for _ in range(n) for task in self._due().next(1)]

    def state_dict(self) -> dict[str, int]:
        """The cursors of the parts, with keys such as "math/epoch"."""
        cursors = {name: part.state_dict() for name, part in self._parts.items()}
        return {f"{name}/{key}": n for name, one in cursors.items() for key, n in one.items()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on from cursors. Raises DataError when they do not fit the data."""
        for name, part in self._parts.items():
            part.load_state_dict({key: state[f"{name}/{key}"] for key in part.state_dict()})

    def _due(self) -> TaskSource:
        drawn = 1 + sum(part.drawn for part in self._parts.values())

        def behind(name: str) -> float:
            return self._shares[name] * drawn - self._parts[name].drawn

        return self._parts[max(self._parts, key=behind)]
