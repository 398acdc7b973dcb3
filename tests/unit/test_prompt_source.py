"""The order in which prompts are drawn."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opd.contracts.rows import Task
from megatron_opd.errors import DataError
from megatron_opd.tasks.source import Mixture, TaskSource, TaskStream
from tests.rows import task


def make_tasks(count: int) -> list[Task]:
    return [task(i) for i in range(count)]


def draw(source: TaskStream, *sizes: int) -> list[int]:
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


# ----------------------------------------------------------------------------------------- mixtures
def mixture(weights: dict[str, float], sizes: list[int], seed: int = 0) -> Mixture:
    """Part n has the tasks 100 n, 100 n + 1, ..."""
    tasks = {}
    for number, (name, size) in enumerate(zip(weights, sizes, strict=True)):
        tasks[name] = [task(100 * number + i) for i in range(size)]
    return Mixture(tasks, weights, seed=seed, shuffle=True)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.floats(1e-3, 1e3), st.integers(1, 9)), min_size=1, max_size=4),
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(0, 12), max_size=5),
    st.integers(1, 30),
)
def test_a_mixture_keeps_its_shares_and_goes_on_as_if_nothing_had_happened(
    parts: list[tuple[float, int]], seed: int, sizes: list[int], then: int
) -> None:
    weights = {f"part{number}": weight for number, (weight, _) in enumerate(parts)}
    counts = [count for _, count in parts]
    whole = mixture(weights, counts, seed)
    drawn = draw(whole, *sizes)
    resumed = mixture(weights, counts, seed)
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    rest = draw(resumed, then)
    assert rest == draw(whole, then)
    all_drawn = drawn + rest
    total = sum(weights.values())
    for number, weight in enumerate(weights.values()):
        own = [index for index in all_drawn if index // 100 == number]
        assert abs(len(own) - len(all_drawn) * weight / total) < len(weights)
        first = own[: counts[number]]
        assert len(set(first)) == len(first)  # an epoch of its own has no task twice


def test_parts_of_a_mixture_have_orders_of_their_own() -> None:
    drawn = draw(mixture({"a": 1.0, "b": 1.0}, [40, 40]), 80)
    assert [i for i in drawn if i < 100] != [i - 100 for i in drawn if i >= 100]
    assert [i // 100 for i in drawn] == [0, 1] * 40
    with pytest.raises(DataError, match="resume with the data set"):
        mixture({"a": 1.0}, [3]).load_state_dict({"a/epoch": 0, "a/position": 4})


# ---------------------------------------------------------------------------------------- curricula
def test_a_curriculum_begins_with_the_lowest_and_shuffles_within_a_level() -> None:
    tasks = [task(i, level=float(-i // 10)) for i in range(40)]  # the last ten are the lowest
    drawn = draw(TaskSource(tasks, seed=1, shuffle=True, ascending=2), 120)
    levels = [tasks[i].level for i in drawn]
    assert levels[:80] == sorted(levels[:40]) * 2
    assert drawn[:40] != drawn[40:80] != sorted(drawn[40:80])
    assert levels[80:] != sorted(levels[80:])
    resumed = TaskSource(tasks, seed=1, shuffle=True, ascending=2)
    resumed.load_state_dict({"epoch": 1, "position": 7})
    assert draw(resumed, 73) == drawn[47:]
    in_order = draw(TaskSource(tasks, seed=1, shuffle=False, ascending=1), 40)
    assert in_order == sorted(range(40), key=lambda i: (tasks[i].level, i))
