"""The order in which prompts are drawn."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opd.contracts.rows import Task
from megatron_opd.errors import DataError
from megatron_opd.tasks.source import TaskSource
from tests.rows import task


def make_tasks(count: int) -> list[Task]:
    return [task(i) for i in range(count)]


def draw(source: TaskSource, *sizes: int) -> list[int]:
    return [drawn.index for size in sizes for drawn in source.next(size)]


def test_every_epoch_is_a_new_permutation() -> None:
    drawn = draw(TaskSource(make_tasks(20), seed=1, shuffle=True), 7, 13, 30, 10)
    epochs = [drawn[:20], drawn[20:40], drawn[40:]]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert drawn != draw(TaskSource(make_tasks(20), seed=2, shuffle=True), 60)


def test_without_shuffling_the_order_is_the_file_s() -> None:
    assert draw(TaskSource(make_tasks(3), seed=1, shuffle=False), 2, 5) == [0, 1, 2, 0, 1, 2, 0]


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(-5, 2**40),
    st.lists(st.integers(0, 12), max_size=6),
    st.integers(1, 30),
)
def test_resuming_draws_what_the_uninterrupted_run_draws(
    count: int, seed: int, sizes: list[int], then: int
) -> None:
    tasks = make_tasks(count)
    source = TaskSource(tasks, seed=seed, shuffle=True)
    draw(source, *sizes)
    resumed = TaskSource(tasks, seed=seed, shuffle=True)
    resumed.load_state_dict(json.loads(json.dumps(source.state_dict())))
    assert draw(resumed, then) == draw(source, then)


def test_a_source_refuses_what_it_cannot_draw_from() -> None:
    with pytest.raises(DataError, match="no prompts"):
        TaskSource([], seed=0, shuffle=True)
    with pytest.raises(DataError, match="resume with the data set the run was started with"):
        TaskSource(make_tasks(3), seed=0, shuffle=True).load_state_dict({"epoch": 0, "position": 4})
