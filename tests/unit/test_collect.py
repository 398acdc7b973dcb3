"""Which samples a step takes."""

from collections import Counter

import numpy as np

from megatron_opd.contracts.rows import Prompt
from megatron_opd.rollout.requests import request_seed, sample_numbers
from megatron_opd.runs.collect import with_new_samples
from megatron_opd.tasks.source import PromptSource


def test_no_two_samples_of_a_step_have_one_seed() -> None:
    """Refills that begin an epoch, of a data set smaller than the step."""
    prompts = [Prompt(i, "", "", "", np.array([1], np.int32)) for i in range(6)]
    source, drawn = PromptSource(prompts, seed=0, shuffle=True), Counter[int]()
    step = [
        prompt
        for size in (8, 5, 3)
        for prompt in with_new_samples(source.next(size), drawn, group_size=5)
    ]
    places = [(prompt.index, sample) for prompt in step for sample in sample_numbers(prompt, 4)]
    assert len({request_seed(0, 0, *place) for place in places}) == len(places) == 64
    # as before, where nothing comes twice
    assert [prompt.first_sample for prompt in step[:6]] == [0] * 6
    traces = {(prompt.index, prompt.first_sample + 4) for prompt in step}
    assert len(traces) == 16 and not traces & set(places)
