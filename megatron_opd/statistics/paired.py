"""Two evaluations of the same questions, compared question by question.

What makes a question hard is in both and cancels, so a paired difference has a smaller error than
the two scores have.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_opd.statistics.intervals import RESAMPLES, bootstrap_95, interval_95

FLIPS = 10_000  # of signs, where they are drawn
_MOST_STEPS = 1 << 28  # of the exact distribution
# standard errors: those of a test at 5 %, and of finding in four cases of five what is there
_POWERED = 1.959964 + 0.841621


@dataclass(frozen=True)
class Difference:
    """second - first, in [-1, 1]."""

    mean: float
    low: float  # of the 95 % interval over questions
    high: float
    error: float  # standard error
    p: float  # two-sided, of no difference
    test: str  # "McNemar" | "sign flips"
    detectable: float  # the smallest true difference that this test finds in four cases of five
    improved: int  # questions that the second answers better
    worsened: int


def compare(
    first_NK: np.ndarray, second_NK: np.ndarray, seed: int = 0, resamples: int = RESAMPLES
) -> Difference:
    """The difference of two score arrays whose rows are the same questions, N >= 2.

    With one sample of 0 or 1 for every question the test is McNemar's exact one and the interval
    Agresti and Min's; otherwise signs are flipped by question and questions are drawn anew.
    """
    difference_N = second_NK.mean(axis=1) - first_NK.mean(axis=1)
    difference_N = np.round(difference_N, 12)  # equal differences are equal numbers
    questions = len(difference_N)
    improved = int((difference_N > 0).sum())
    worsened = int((difference_N < 0).sum())
    error = float(difference_N.std(ddof=1)) / math.sqrt(questions)
    if bool(np.isin(difference_N, (-1, 0, 1)).all()):
        low, high = changes_95(improved, worsened, questions)
        p, test = mcnemar_p(improved, worsened), "McNemar"
    else:
        low, high = bootstrap_95(difference_N, seed, resamples)
        p, test = sign_flip_p(difference_N, seed), "sign flips"
    detectable = _POWERED * error if error else _unseen(questions)
    mean = float(difference_N.mean())
    return Difference(
        mean, max(low, -1.0), min(high, 1.0), error, p, test, detectable, improved, worsened
    )


def _unseen(questions: int) -> float:
    """The share of questions that may differ where none of these does."""
    return interval_95(np.zeros((questions, 1)))[1]


def changes_95(improved: int, worsened: int, questions: int) -> tuple[float, float]:
    """The 95 % interval of (improved - worsened) / questions, of Agresti and Min (2005): half a
    question is added to every cell, so that no change has a width too."""
    total = questions + 2
    mean = (improved - worsened) / total
    half = 1.96 * math.sqrt(improved + worsened + 1 - total * mean**2) / total
    return mean - half, mean + half


def mcnemar_p(improved: int, worsened: int) -> float:
    """The exact two-sided p of as many questions improved as worsened."""
    changed = improved + worsened
    fewer = min(improved, worsened)
    ways = 1
    tail = 0
    for rank in range(fewer + 1):
        tail += ways
        ways = ways * (changed - rank) // (rank + 1)
    return min(1.0, 2 * tail / 2**changed)


def sign_flip_p(difference_N: np.ndarray, seed: int = 0) -> float:
    """The two-sided p of differences that are as likely to have the other sign.

    Exact where they are multiples of one step, as those of scores of 0 and 1 are; else of 10,000
    draws, at least 1 / 10,001.
    """
    size_M = np.abs(difference_N[difference_N != 0])
    if not len(size_M):
        return 1.0
    step = float(size_M.min())
    for divisor in (1, 2, 3, 4):
        steps_M = np.rint(size_M / step * divisor).astype(np.int64)
        whole = np.allclose(steps_M * (step / divisor), size_M, rtol=0, atol=1e-9)
        if whole and len(size_M) * int(steps_M.sum()) <= _MOST_STEPS:
            total = int((np.sign(difference_N[difference_N != 0]) * steps_M).sum())
            return _exact_p(steps_M, abs(total))
    return _drawn_p(difference_N, seed)


def _exact_p(steps_M: np.ndarray, total: int) -> float:
    """The chance of a sum of `steps_M`, with signs by coins, at least `total` from 0."""
    most = int(steps_M.sum())
    chance = np.zeros(2 * most + 1)  # of a sum, from -most on
    chance[most] = 1.0
    for size in steps_M:
        flipped = np.zeros_like(chance)
        flipped[size:] = chance[:-size] / 2
        flipped[:-size] += chance[size:] / 2
        chance = flipped
    if total == 0:
        return 1.0
    return min(1.0, 2 * float(chance[most + total :].sum()))


def _drawn_p(difference_N: np.ndarray, seed: int) -> float:
    rng = np.random.default_rng(seed)
    size_L, count_L = np.unique(np.abs(difference_N), return_counts=True)
    observed = abs(float(difference_N.sum())) - 1e-9
    as_large = 0
    for start in range(0, FLIPS, 100):
        shape = (min(100, FLIPS - start), len(size_L))
        sum_R = (2 * rng.binomial(count_L, 0.5, shape) - count_L) @ size_L
        as_large += int((np.abs(sum_R) >= observed).sum())
    return (as_large + 1) / (FLIPS + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p of every test, corrected for their number: Holm's, which bounds the chance of any false
    finding."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected = [1.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, p_values[index] * (len(p_values) - rank)))
        corrected[index] = largest
    return corrected


def p_words(p: float) -> str:
    """A p-value behind the letter."""
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"
