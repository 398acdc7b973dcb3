"""The confidence interval of an accuracy, over prompts of the same kind."""

import math

import numpy as np

_Z = 1.96  # standard errors that 95 % of a normal distribution lie within


def interval_95(rewards_NK: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of the mean of K rewards in [0, 1] for each of N prompts; NaN where an
    attempt is missing, one of each prompt's is there.

    It is Wilson's, so that a mean of 0 or 1 has a width too. The K answers to one prompt resemble
    one another, so the number of independent answers is taken from the spread between prompts (N
    for K = 1).
    """
    mean = float(np.nanmean(rewards_NK))
    prompts = len(rewards_NK)
    error_squared = float(np.nanmean(rewards_NK, axis=1).var()) / prompts
    answers = mean * (1 - mean) / error_squared if error_squared > 0 else prompts
    answers = min(answers, int((~np.isnan(rewards_NK)).sum()))
    shrink = 1 + _Z**2 / answers
    centre = (mean + _Z**2 / (2 * answers)) / shrink
    half = _Z / shrink * math.sqrt(mean * (1 - mean) / answers + _Z**2 / (4 * answers**2))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def difference_95(first_N: np.ndarray, second_N: np.ndarray) -> tuple[float, float, float]:
    """The mean of second - first over N prompts, and its 95 % interval.

    Both are means of the same prompts, so that what makes a prompt hard cancels.
    """
    differences_N = second_N - first_N
    mean = float(differences_N.mean())
    half = _Z * float(differences_N.std(ddof=1)) / math.sqrt(len(differences_N))
    return mean, max(mean - half, -1.0), min(mean + half, 1.0)
