"""Rewards of rows against those of their group. NumPy only, no torch."""

import numpy as np


def group_advantages(
    rewards_N: np.ndarray,
    groups_N: np.ndarray,
    normalise: str,
    eps: float,
    episodes_N: np.ndarray | None = None,
) -> np.ndarray:
    """Rewards relative to their group, float64 [N]; `groups_N` names the group of each row.

    A group's members are its rows, or, with the name of each row's episode, its episodes, with the
    mean of their rows. std: (r - mean) / (std + eps), the unbiased deviation, as in the
    implementations the papers ran; 0 where all rewards are equal. An episode's rows share its
    weight in the deviation, so that a penalty of one row is measured by a deviation that knows it.
    mean: r - mean. leave_one_out: r - mean of the others. none: r.
    Source: GRPO, arXiv 2402.03300, section 4.1.2; Dr. GRPO, arXiv 2503.20783.
    """
    if normalise == "none":
        return rewards_N.astype(np.float64)
    if episodes_N is None:
        episodes_N = np.arange(len(rewards_N))
    advantages_N = np.zeros(len(rewards_N), dtype=np.float64)
    for group in np.unique(groups_N):
        rows = groups_N == group
        _, member_R = np.unique(episodes_N[rows], return_inverse=True)
        rewards_M = np.bincount(member_R, rewards_N[rows]) / np.bincount(member_R)
        size = len(rewards_M)
        centred_R = rewards_N[rows] - rewards_M.mean()
        if normalise == "std" and size > 1:
            within_R = (rewards_N[rows] - rewards_M[member_R]) ** 2
            within = (np.bincount(member_R, within_R) / np.bincount(member_R)).sum() / (size - 1)
            centred_R = centred_R / (np.sqrt(rewards_M.var(ddof=1) + within) + eps)
        elif normalise == "leave_one_out" and size > 1:
            own_R = rewards_M[member_R]
            others_R = (own_R - rewards_M.mean()) * size / (size - 1)
            centred_R = others_R + (rewards_N[rows] - own_R)
        advantages_N[rows] = centred_R
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
