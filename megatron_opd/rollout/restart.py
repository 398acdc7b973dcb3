"""A sampler that survives the failure of an engine."""

from collections.abc import Callable, Sequence

from megatron_opd.contracts.rows import Row, Task
from megatron_opd.contracts.sampling import Draw
from megatron_opd.contracts.stations import Sampler
from megatron_opd.errors import RunError
from megatron_opd.world.processes import any_rank

# Starts the engines again, with the weights of a version, for a reason. Collective.
Restart = Callable[[int, str], None]


class Restarting:
    """A sampler that samples again on all ranks, once, when an engine fails on one of them.

    Without a `restart` the failure ends the run, on every rank.
    """

    def __init__(self, sampler: Sampler, restart: Restart | None) -> None:
        self._sampler = sampler
        self._restart = restart

    def sample(self, tasks: Sequence[Task], draw: Draw) -> list[Row]:
        """The rows of the sampler: see `Sampler.sample`. Collective."""
        failure = None
        try:
            rows = self._sampler.sample(tasks, draw)
        except RunError as error:
            failure = error
        if not any_rank(failure is not None):
            return rows
        reason = str(failure or "the engine of another rank failed")
        if self._restart is None:
            raise failure or RunError(reason)
        # Its traceback refers to the engine that failed, whose memory the next one needs.
        failure = None
        self._restart(draw.version, reason)
        return self._sampler.sample(tasks, draw)
