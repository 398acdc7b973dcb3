"""What happens when an engine fails while it samples."""

from collections.abc import Callable, Sequence

from megatron_opd.contracts.rows import Row, Task
from megatron_opd.contracts.sampling import Draw
from megatron_opd.contracts.stations import Sampler
from megatron_opd.errors import RunError
from megatron_opd.world.processes import any_rank

# (version, reason): starts the engines again, with the weights of that version. Collective.
Restart = Callable[[int, str], None]


class Restarting:
    """A sampler that samples anew on all ranks, once, where an engine fails on one of them.

    Without a `restart` the failure ends the run, on every rank.
    """

    def __init__(self, sampler: Sampler, restart: Restart | None) -> None:
        self._sampler = sampler
        self._restart = restart

    def sample(self, tasks: Sequence[Task], draw: Draw) -> list[Row]:
        """As `Sampler.sample`."""
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
        # its traceback holds the engine that failed, whose memory the next one needs
        failure = None
        self._restart(draw.version, reason)
        return self._sampler.sample(tasks, draw)
