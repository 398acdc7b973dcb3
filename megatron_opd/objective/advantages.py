"""What a token is worth: rewards within a group, and functions of the teacher's log-ratio. All of
it is detached."""

import math
from typing import assert_never

import numpy as np
import torch
from torch import Tensor

from megatron_opd.methods.advantages import LogRatioAdvantage

LOWEST = -30.0  # a token the teacher gives less than e^-30, or does not have, counts as this


def group_advantages(
    rewards_N: np.ndarray, groups_N: np.ndarray, normalise: str, eps: float
) -> np.ndarray:
    """Rewards relative to their group, float64 [N]; `groups_N` names each row's group.

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


def log_ratio(model_logprobs_T: Tensor, student_logprobs_T: Tensor) -> Tensor:
    """D = log p_model - log p_student of the tokens, detached; above 0 the model likes the token
    better."""
    return model_logprobs_T.clamp(min=LOWEST) - student_logprobs_T.detach()


def transformed(delta_T: Tensor, advantage: LogRatioAdvantage) -> Tensor:
    """f(D) of an advantage: with -sg[f(D)] log p as the loss, the expected gradient is that of a
    divergence.

    identity: reverse KL. expm1: forward KL. mixture: (1 - b) ln(1 - b + b e^D), the JSD with beta =
    b.
    floor: REOPOLD's lower bound ln(l) / (1 - l), arXiv 2603.11137, Eq. 5 and 7.
    """
    match advantage.transform:
        case "identity":
            return delta_T
        case "expm1":
            return delta_T.expm1()
        case "floor":
            assert advantage.mix is not None, "checked before the run"
            return delta_T.clamp(min=floor(advantage.mix))
        case "mixture":
            assert advantage.mix is not None, "checked before the run"
            beta = advantage.mix
            # log(1 - b + b e^D) without overflow
            logs = torch.stack(
                [torch.full_like(delta_T, math.log1p(-beta)), math.log(beta) + delta_T]
            )
            return (1 - beta) * logs.logsumexp(dim=0)
        case _:
            assert_never(advantage.transform)


def returns_to_go(
    values_T: Tensor, lengths_N: np.ndarray, discount: float, *, mean: bool
) -> Tensor:
    """R_t = v_t + discount R_(t+1) within each sequence; with `mean` over the number of tokens to
    its end.

    Source: MiniLLM, arXiv 2306.08543, section 2.2 (length-normalised, discounted return).
    """
    to_go_N, longest = torch.from_numpy(lengths_N)[:, None], int(lengths_N.max(initial=0))
    inside_NL = torch.arange(longest) < to_go_N
    returns_NL = values_T.new_zeros(inside_NL.shape).masked_scatter(inside_NL, values_T)
    for t in range(longest - 2, -1, -1):  # over the places in a response, for all of them at once
        returns_NL[:, t] += discount * returns_NL[:, t + 1]
    if mean:
        returns_NL /= (to_go_N - torch.arange(longest)).clamp(min=1)
    return returns_NL[inside_NL]


def whitened(values_T: Tensor, counted_T: Tensor) -> Tensor:
    """Mean 0 and deviation 1 over the tokens that count; those that do not are 0."""
    counted = values_T[counted_T]
    if len(counted) < 2:
        return torch.zeros_like(values_T)
    return ((values_T - counted.mean()) / (counted.std() + 1e-8)).masked_fill(~counted_T, 0.0)


def floor(mix: float) -> float:
    """The limit of log[((1 - l) q + l p) / p] / (1 - l) where the teacher's q goes to 0."""
    return math.log(mix) / (1 - mix)


def factor(advantages_T: Tensor, delta_T: Tensor, weight: float, clip: float) -> Tensor:
    """RLSD's multiplier, arXiv 2604.03128, Algorithm 1: larger where the teacher agrees with the
    advantage's sign."""
    agreement_T = (advantages_T.sign() * delta_T).exp().clamp(1 - clip, 1 + clip)
    return 1 - weight + weight * agreement_T
