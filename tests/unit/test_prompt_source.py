"""The order in which prompts are drawn."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opd.contracts.rows import Prompt
from megatron_opd.errors import DataError
from megatron_opd.tasks.source import PromptSource


def make_prompts(count: int) -> list[Prompt]:
    return [Prompt(i, "", "", "", np.zeros(1, np.int32)) for i in range(count)]


def draw(source: PromptSource, *sizes: int) -> list[int]:
    return [prompt.index for size in sizes for prompt in source.next(size)]


def test_every_epoch_is_a_new_permutation() -> None:
    drawn = draw(PromptSource(make_prompts(20), seed=1, shuffle=True), 7, 13, 30, 10)
    epochs = [drawn[:20], drawn[20:40], drawn[40:]]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert drawn != draw(PromptSource(make_prompts(20), seed=2, shuffle=True), 60)


def test_without_shuffling_the_order_is_the_file_s() -> None:
    assert draw(PromptSource(make_prompts(3), seed=1, shuffle=False), 2, 5) == [0, 1, 2, 0, 1, 2, 0]


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
    prompts = make_prompts(count)
    source = PromptSource(prompts, seed=seed, shuffle=True)
    draw(source, *sizes)
    resumed = PromptSource(prompts, seed=seed, shuffle=True)
    resumed.load_state_dict(json.loads(json.dumps(source.state_dict())))
    assert draw(resumed, then) == draw(source, then)


def test_a_source_refuses_what_it_cannot_draw_from() -> None:
    with pytest.raises(DataError, match="no prompts"):
        PromptSource([], seed=0, shuffle=True)
    with pytest.raises(DataError, match="resume with the data set the run was started with"):
        PromptSource(make_prompts(3), seed=0, shuffle=True).load_state_dict(
            {"epoch": 0, "position": 4}
        )
