"""Rows of the data's traces, in the place of sampled ones or beside them."""

from collections.abc import Sequence

from megatron_opd.contracts.rows import Row, Task
from megatron_opd.contracts.sampling import Draw
from megatron_opd.contracts.stations import Sampler


class Traces:
    """The trace of every task, once."""

    def sample(self, tasks: Sequence[Task], draw: Draw) -> list[Row]:
        """The traces of the tasks: see `Sampler.sample`. Nothing is drawn."""
        return [Row.of_trace(task, group) for group, task in enumerate(tasks)]


class WithTraces:
    """Adds `per_group` traces to the samples of every task, numbered behind them."""

    def __init__(self, sampler: Sampler, per_group: int) -> None:
        self._sampler = sampler
        self._per_group = per_group

    def sample(self, tasks: Sequence[Task], draw: Draw) -> list[Row]:
        """The rows of the sampler with traces behind each task's: see `Sampler.sample`."""
        rows = self._sampler.sample(tasks, draw)
        traces = []
        for group, task in enumerate(tasks):
            first = task.first_sample + draw.samples
            for number in range(first, first + self._per_group):
                traces.append(Row.of_trace(task, group, number))
        return sorted(rows + traces, key=lambda row: row.group)
