"""How far an accuracy may be from that of other prompts of the same kind."""

import math

import numpy as np

_Z = 1.96  # standard errors that 95 % of a normal distribution lie within


def interval_95(rewards_NK: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of the mean of K rewards in [0, 1] for each of N prompts.

    Wilson's, with as many independent answers as the spread between prompts says (for K = 1: N):
    the K answers to one prompt resemble each other, and a mean of 0 or 1 still has a width.
    """
    mean = float(rewards_NK.mean())
    prompts = len(rewards_NK)
    error_squared = float(rewards_NK.mean(axis=1).var()) / prompts
    answers = mean * (1 - mean) / error_squared if error_squared > 0 else prompts
    answers = min(answers, rewards_NK.size)
    centre = (mean + _Z**2 / (2 * answers)) / (1 + _Z**2 / answers)
    half = (
        _Z
        / (1 + _Z**2 / answers)
        * math.sqrt(mean * (1 - mean) / answers + _Z**2 / (4 * answers**2))
    )
    return max(centre - half, 0.0), min(centre + half, 1.0)
