"""Samplers around samplers, and what a step makes of their rows; no engine is needed."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest

from megatron_opd.contracts.rows import (
    Episode,
    Row,
    Source,
    Task,
    Verdict,
    episodes_of,
    with_episodes,
)
from megatron_opd.contracts.sampling import Draw
from megatron_opd.errors import RunError
from megatron_opd.metrics.summary import Clock
from megatron_opd.rollout.restart import Restarting
from megatron_opd.rollout.traces import Traces, WithTraces
from megatron_opd.runs.collect import collect
from megatron_opd.tasks.source import TaskSource
from megatron_opd.world import processes
from tests.rows import row, task
from tests.scripted import rows_of_episodes

DRAW = Draw(seed=0, step=7, version=7, samples=2, max_tokens=4, temperature=1.0)
TASKS = [task(i, answer="1", trace="a", trace_ids=np.array([4, 2], np.int32)) for i in range(6)]


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    processes.start()
    yield
    processes.stop()


class Numbers:
    """A row for every sample, with its number as the only token."""

    def __init__(self, failures: int = 0) -> None:
        self.failures = failures

    def sample(self, tasks: Sequence[Task], draw: Draw) -> list[Row]:
        if self.failures:
            self.failures -= 1
            raise RunError("no memory")
        return [
            row([number], of=each, group=group, sample=number)
            for group, each in enumerate(tasks)
            for number in range(each.first_sample, each.first_sample + draw.samples)
        ]


class OddTasksDiffer:
    """The second sample of an odd task is right; no other one is."""

    def score(self, rows: Sequence[Row]) -> list[Row]:
        def judged(episode):
            right = float(episode.task.index % 2 and episode.sample % 2)
            return replace(episode, verdict=Verdict(right, bool(right), "judged"), reward=right)

        return with_episodes(rows, judged)


class Notes:
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.counts: dict[str, int] = {}

    def note(self, text: str) -> None:
        self.lines.append(text)

    def count(self, name: str, number: int) -> None:
        self.counts[name] = self.counts.get(name, 0) + number


@pytest.mark.parametrize(("max_refills", "expected"), [(0, [0, 1, 2]), (1, [1, 3, 0])])
def test_groups_of_equal_rewards_are_replaced_and_then_fill_up(
    max_refills: int, expected: list[int]
) -> None:
    source, notes = TaskSource(TASKS, seed=0, shuffle=False), Notes()
    rows = collect(
        Numbers(), source, OddTasksDiffer(), DRAW, Clock(), notes,
        num_groups=3, group_size=2, max_refills=max_refills,
    )  # fmt: skip
    assert [r.task.index for r in rows[::2]] == [r.task.index for r in rows[1::2]] == expected
    assert [r.group for r in rows] == [0, 0, 1, 1, 2, 2]
    assert not notes.lines and not notes.counts


class Talks:
    """Episodes of several turns, of which some fail."""

    def __init__(self, fails: Callable[[Episode], bool]) -> None:
        self.fails = fails

    def sample(self, tasks: Sequence[Task], draw: Draw) -> list[Row]:
        rows = rows_of_episodes("window", 11, len(tasks), draw.samples)
        return with_episodes(rows, lambda e: replace(e, ended="failed") if self.fails(e) else e)


def test_failed_episodes_are_left_out_and_counted() -> None:
    source, notes = TaskSource(TASKS, seed=0, shuffle=False), Notes()
    settings = {"num_groups": 3, "group_size": 2, "max_refills": 0}
    sampler = Talks(lambda episode: (episode.group, episode.sample) in [(0, 1), (1, 0), (1, 1)])
    rows = collect(sampler, source, None, DRAW, Clock(), notes, **settings)
    assert notes.counts == {"rollout/failed_episodes": 3}
    (line,) = notes.lines
    assert line.startswith("warning: step 7: the environments of 3 episodes failed, the first in")
    # group 1 is gone, and the next one has its number
    episodes = [(e.group, e.task.index, e.sample) for e in episodes_of(rows)]
    assert episodes == [(0, 0, 0), (1, 2, 0), (1, 2, 1)]
    last = [r for r in rows if r.episode.key == episodes[-1]]
    assert [r.turn for r in last] == [*range(last[0].episode.turns)] and len(last) > 1
    with pytest.raises(RunError, match="step 7: every episode failed"):
        collect(Talks(lambda _: True), source, None, DRAW, Clock(), notes, **settings)


def test_traces_stand_behind_the_samples_of_their_group() -> None:
    again = replace(TASKS[1], first_sample=3)
    rows = WithTraces(Numbers(), per_group=1).sample([TASKS[0], again], DRAW)
    assert [(r.task.index, r.group, r.sample) for r in rows] == [
        (0, 0, 0), (0, 0, 1), (0, 0, 2), (1, 1, 3), (1, 1, 4), (1, 1, 5),
    ]  # fmt: skip
    assert [r.num_given for r in rows] == [0, 0, 2, 0, 0, 2]
    alone = Traces().sample(TASKS, DRAW)
    assert [(r.task.index, r.group, r.sample) for r in alone] == [(i, i, 0) for i in range(6)]
    assert all((r.sources == Source.TRACE).all() for r in alone)


@pytest.mark.parametrize("failures", [0, 1, 2])
def test_an_engine_that_fails_is_started_again_once(failures: int) -> None:
    restarts: list[tuple[int, str]] = []
    sampler = Restarting(Numbers(failures), lambda *place: restarts.append(place))
    if failures == 2:
        with pytest.raises(RunError, match="no memory"):
            sampler.sample(TASKS, DRAW)
    else:
        assert len(sampler.sample(TASKS, DRAW)) == 12
    assert restarts == [(7, "no memory")] * min(failures, 1)


def test_without_a_restart_the_failure_ends_the_run() -> None:
    with pytest.raises(RunError, match="no memory"):
        Restarting(Numbers(failures=1), None).sample(TASKS, DRAW)
