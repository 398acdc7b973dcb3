"""Rewards of rows against those of their group. NumPy only, no torch."""

import numpy as np


def group_advantages(
    rewards_N: np.ndarray, groups_N: np.ndarray, normalise: str, eps: float
) -> np.ndarray:
    """Rewards relative to their group, float64 [N]; `groups_N` names the group of each row.

    std: (r - mean) / (std + eps), the unbiased deviation, as in the implementations the papers ran;
    0 where all rewards are equal. mean: r - mean. leave_one_out: r - mean of the others. none: r.
    Source: GRPO, arXiv 2402.03300, section 4.1.2; Dr. GRPO, arXiv 2503.20783.
    """
    if normalise == "none":
        return rewards_N.astype(np.float64)
    advantages_N = np.zeros(len(rewards_N), dtype=np.float64)
    for group in np.unique(groups_N):
        members = groups_N == group
        size = int(members.sum())
        centred = rewards_N[members] - rewards_N[members].mean()
        if normalise == "std" and size > 1:
            centred = centred / (centred.std(ddof=1) + eps)
        elif normalise == "leave_one_out" and size > 1:
            centred = centred * size / (size - 1)
        advantages_N[members] = centred
    return advantages_N


def overlong_penalty(
    lengths_N: np.ndarray, max_completion_tokens: int, overlong: float
) -> np.ndarray:
    """From 0 down to -1 over the last `overlong` of the longest response, float64 [N]. Source:
    DAPO, Eq. 13."""
    if overlong == 0:
        return np.zeros(len(lengths_N))
    buffer = overlong * max_completion_tokens
    return -np.clip((lengths_N - (max_completion_tokens - buffer)) / buffer, 0.0, 1.0)
