"""Which samples a step takes."""

from collections import Counter

import pytest

from megatron_opd.contracts.draws import request_seed
from megatron_opd.contracts.rows import UNSCORED, Row, Verdict
from megatron_opd.errors import RunError
from megatron_opd.rollout.requests import sample_numbers
from megatron_opd.runs.collect import check_verdicts, with_new_samples
from megatron_opd.tasks.source import TaskSource
from tests.rows import row, task


def test_no_two_samples_of_a_step_have_one_seed() -> None:
    """Refills that begin an epoch, of a data set smaller than the step."""
    tasks = [task(i) for i in range(6)]
    source, drawn = TaskSource(tasks, seed=0, shuffle=True), Counter[int]()
    step = [
        drawn_task
        for size in (8, 5, 3)
        for drawn_task in with_new_samples(source.next(size), drawn, group_size=5)
    ]
    places = [(each.index, sample) for each in step for sample in sample_numbers(each, 4)]
    assert len({request_seed(0, 0, *place) for place in places}) == len(places) == 64
    # as before, where nothing comes twice
    assert [each.first_sample for each in step[:6]] == [0] * 6
    traces = {(each.index, each.first_sample + 4) for each in step}
    assert len(traces) == 16 and not traces & set(places)


def judged(*reasons: str) -> list[Row]:
    verdicts = [Verdict(0.0, None, reason) for reason in reasons]
    return [row([1], sample=i, verdict=verdict) for i, verdict in enumerate(verdicts)]


def test_a_verifier_that_fails_is_warned_of_and_then_ends_the_run() -> None:
    assert check_verdicts(judged(*["crashed"], *["wrong"] * 19), 3) is None
    warning = check_verdicts(judged("crashed", "bad_gold", *["wrong"] * 18), 3)
    assert warning is not None
    assert warning.startswith("warning: step 3: 2 of 20 answers could not be judged (1 crashed, 1")
    with pytest.raises(RunError, match=r"step 3: 11 of 20 .* \(11 bad_gold\); mend the gold"):
        check_verdicts(judged(*["bad_gold"] * 11, *["correct"] * 9), 3)


def test_answers_that_a_model_makes_slow_and_unjudged_ones_are_no_failures() -> None:
    for reason in ("timeout", "over_budget", "too_long", "no_answer", UNSCORED.reason):
        assert check_verdicts(judged(*[reason] * 20), 0) is None
