"""Scores, intervals and paired differences against exact references and in simulations."""

import itertools
import math
import time
from fractions import Fraction

import numpy as np
import pytest

from megatron_opd.statistics.intervals import bootstrap_95, interval_95, student_t
from megatron_opd.statistics.paired import (
    changes_95,
    compare,
    holm,
    mcnemar_p,
    sign_flip_p,
)
from megatron_opd.statistics.scores import majority, pass_at_k, question_error, seed_error

TRUE_MEAN = 0.5 / 1.3  # of difficulties drawn from Beta(0.5, 0.8)


def drawn(rng: np.random.Generator, chance_N: np.ndarray, samples: int) -> np.ndarray:
    return (rng.random((len(chance_N), samples)) < chance_N[:, None]).astype(float)


# ------------------------------------------------------------------------------------------ scores
@pytest.mark.parametrize("samples", [1, 4, 7])
def test_pass_at_k_counts_every_choice_of_k_samples(samples: int) -> None:
    right_NK = np.tri(samples + 1, samples, -1)  # 0, 1, .. all of them right
    for k in range(1, samples + 1):
        choices = list(itertools.combinations(range(samples), k))
        expected = [sum(row[list(chosen)].any() for chosen in choices) for row in right_NK]
        exact = [float(Fraction(int(count), len(choices))) for count in expected]
        assert pass_at_k(right_NK, k) == pytest.approx(exact, abs=1e-15)
    assert pass_at_k(right_NK, 1).mean() == pytest.approx(right_NK.mean())


def test_pass_at_k_of_all_samples_is_any_right_one() -> None:
    """Drawing with replacement would give 0.684 for one right of four."""
    assert pass_at_k(np.array([[1, 0, 0, 0], [0, 0, 0, 0]]), 4).tolist() == [1.0, 0.0]
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"pass@{k} needs from 1 to 4"):
            pass_at_k(np.zeros((1, 4)), k)


@pytest.mark.parametrize(
    ("votes", "scores", "expected"),
    [
        (["7", "7", "8"], [1, 1, 0], 1.0),
        (["7", "8", "8"], [1, 0, 0], 0.0),
        (["7", "8", "", ""], [1, 0, 0, 0], 0.5),  # a tie; who has no answer does not vote
        (["", "", ""], [0, 0, 0], 0.0),
        (["7", "7"], [1, 0], 0.5),  # the verifier failed once
    ],
)
def test_the_majority_is_the_most_frequent_answer(
    votes: list[str], scores: list[float], expected: float
) -> None:
    assert majority([votes], np.array([scores], dtype=float)).tolist() == [expected]


def test_errors_against_the_spread_of_many_evaluations() -> None:
    """New questions are drawn, and the same questions with new seeds."""
    rng = np.random.default_rng(0)
    fixed_N = rng.beta(0.5, 0.8, 30)
    new = [drawn(rng, rng.beta(0.5, 0.8, 30), 8) for _ in range(1000)]
    same = [drawn(rng, fixed_N, 8) for _ in range(1000)]
    between = np.std([score_NK.mean() for score_NK in new])
    within = np.std([score_NK.mean() for score_NK in same])
    assert np.mean([question_error(score_NK) for score_NK in new]) == pytest.approx(
        between, rel=0.06
    )
    assert np.mean([seed_error(score_NK) for score_NK in same]) == pytest.approx(within, rel=0.08)
    naive = math.sqrt(TRUE_MEAN * (1 - TRUE_MEAN) / (30 * 8))
    assert naive < between / 1.8  # all samples as if they were independent


def test_errors_that_cannot_be_known_are_none() -> None:
    assert seed_error(np.array([[1.0], [0.0]])) is None
    assert question_error(np.array([[1.0, 0.0]])) is None
    assert seed_error(np.ones((3, 4))) == 0


# --------------------------------------------------------------------------------------- intervals
@pytest.mark.parametrize(("freedom", "quantile"), [(5, 2.5706), (9, 2.2622), (29, 2.0452)])
def test_students_quantile(freedom: int, quantile: float) -> None:
    assert student_t(freedom) == pytest.approx(quantile, rel=1e-3)


def test_the_bootstrap_is_seeded_and_agrees_with_the_formula() -> None:
    value_N = np.random.default_rng(0).random(400)
    low, high = bootstrap_95(value_N, seed=1)
    assert (low, high) == bootstrap_95(value_N, seed=1) != bootstrap_95(value_N, seed=2)
    half = 1.96 * value_N.std(ddof=1) / 20
    assert low == pytest.approx(value_N.mean() - half, abs=1.5e-3)
    assert high == pytest.approx(value_N.mean() + half, abs=1.5e-3)
    # few distinct values are drawn by their counts, which is the same distribution
    few_N = np.round(value_N)
    half = 1.96 * few_N.std(ddof=1) / 20
    assert bootstrap_95(few_N)[0] == pytest.approx(few_N.mean() - half, abs=3e-3)


@pytest.mark.parametrize(("questions", "samples"), [(30, 32), (198, 4), (198, 1)])
def test_the_interval_of_a_score_covers_the_truth(questions: int, samples: int) -> None:
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(1000):
        low, high = interval_95(drawn(rng, rng.beta(0.5, 0.8, questions), samples))
        covered += low <= TRUE_MEAN <= high
    assert 930 <= covered <= 970


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("samples", [1, 32])
def test_a_score_of_nothing_or_all_has_a_width(value: float, samples: int) -> None:
    low, high = interval_95(np.full((30, samples), value))
    assert (low, high) == pytest.approx((0, 0.1135) if value == 0 else (0.8865, 1), abs=1e-3)


def test_a_large_suite_takes_seconds() -> None:
    """MMLU-Pro's 12,032 questions: scores of samples, and values that are all different."""
    rng = np.random.default_rng(0)
    first_NK = drawn(rng, rng.beta(0.5, 0.8, 12032), 4)
    second_NK = drawn(rng, rng.beta(0.5, 0.8, 12032), 4)
    start = time.monotonic()
    assert compare(first_NK, second_NK).p > 0.001
    bootstrap_95(rng.random(12032), resamples=2000)
    assert time.monotonic() - start < 30  # 2 s on a core of its own


# ------------------------------------------------------------------------------------- differences
@pytest.mark.parametrize(("questions", "samples"), [(30, 32), (60, 4), (198, 1)])
def test_the_interval_of_a_difference_covers_the_truth(questions: int, samples: int) -> None:
    """The second model is better at every third question, by a half of what is left."""
    rng = np.random.default_rng(7)
    truth = (1 - TRUE_MEAN) / 2 / 3
    covered = 0
    for draw in range(1000):
        first_N = rng.beta(0.5, 0.8, questions)
        better_N = rng.random(questions) < 1 / 3
        second_N = first_N + better_N * (1 - first_N) / 2
        first_NK = drawn(rng, first_N, samples)
        second_NK = drawn(rng, second_N, samples)
        found = compare(first_NK, second_NK, seed=draw, resamples=500)
        covered += found.low <= truth <= found.high
    assert 930 <= covered <= 970


def test_equal_models_are_told_apart_once_in_twenty_times() -> None:
    rng = np.random.default_rng(11)
    told = 0
    for draw in range(1000):
        chance_N = rng.beta(0.5, 0.8, 60)
        first_NK = drawn(rng, chance_N, 8)
        second_NK = drawn(rng, chance_N, 8)
        told += sign_flip_p(second_NK.mean(axis=1) - first_NK.mean(axis=1), seed=draw) <= 0.05
    assert 30 <= told <= 65


def test_a_detectable_difference_is_found_in_four_cases_of_five() -> None:
    rng = np.random.default_rng(5)
    p_values = []
    detectable = []
    for _ in range(400):
        first_N = rng.beta(0.5, 0.8, 60) * 0.9
        first_NK = drawn(rng, first_N, 16)
        second_NK = drawn(rng, first_N + 0.05, 16)
        found = compare(first_NK, second_NK, resamples=100)
        p_values.append(found.p)
        detectable.append(found.detectable)
    assert np.mean(detectable) == pytest.approx(0.05, abs=0.004)
    assert 0.70 <= np.mean(np.array(p_values) <= 0.05) <= 0.88


def test_flipped_signs_are_counted_exactly() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        difference_N = rng.integers(-3, 4, 9) / 4
        signs = np.array(list(itertools.product((-1, 1), repeat=9)))
        sums = np.abs(signs @ np.abs(difference_N))
        exact = np.mean(sums >= abs(difference_N.sum()) - 1e-9)
        assert sign_flip_p(difference_N) == pytest.approx(exact, abs=1e-12)


def test_signs_of_numbers_without_a_common_step_are_drawn() -> None:
    difference_N = np.array([0.1, 0.2**0.5, 0.3**0.5, -(0.05**0.5), 0.7**0.5, 0.11, 0.9])
    signs = np.array(list(itertools.product((-1, 1), repeat=7)))
    exact = np.mean(np.abs(signs @ difference_N) >= abs(difference_N.sum()) - 1e-9)
    assert sign_flip_p(difference_N) == pytest.approx(exact, abs=0.01)


@pytest.mark.parametrize(
    ("improved", "worsened", "p"), [(5, 0, 0.0625), (9, 1, 22 / 1024), (3, 3, 1.0), (0, 0, 1.0)]
)
def test_mcnemars_test_is_that_of_flipped_signs(improved: int, worsened: int, p: float) -> None:
    difference_N = np.array([1.0] * improved + [-1.0] * worsened + [0.0] * 4)
    assert mcnemar_p(improved, worsened) == pytest.approx(p)
    assert sign_flip_p(difference_N) == pytest.approx(p)


def test_one_sample_each_takes_mcnemar_and_no_change_has_a_width() -> None:
    first_NK = np.zeros((50, 1))
    second_NK = first_NK.copy()
    second_NK[:6] = 1
    found = compare(first_NK, second_NK)
    assert (found.test, found.improved, found.worsened) == ("McNemar", 6, 0)
    assert (found.mean, found.p) == pytest.approx((0.12, 2 / 64))
    assert (found.low, found.high) == pytest.approx(changes_95(6, 0, 50))
    same = compare(second_NK, second_NK)
    assert (same.mean, same.p, same.improved) == (0, 1, 0)
    assert same.low < 0 < same.high and same.detectable > 0.05


def test_holms_correction() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
