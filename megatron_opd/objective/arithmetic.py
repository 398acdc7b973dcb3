"""Arithmetic on the tokens of rows that no part owns. All of it is detached."""

import numpy as np
import torch
from torch import Tensor

LOWEST = -30.0  # a token the teacher gives less than e^-30, or does not have, counts as this


def log_ratio(model_logprobs_T: Tensor, student_logprobs_T: Tensor) -> Tensor:
    """D = log p_model - log p_student of the tokens, detached; above 0 the model likes the token
    better."""
    return model_logprobs_T.clamp(min=LOWEST) - student_logprobs_T.detach()


def returns_to_go(
    values_T: Tensor, lengths_N: np.ndarray, discount: float, *, mean: bool
) -> Tensor:
    """R_t = v_t + discount R_(t+1) within each sequence; with `mean` over the number of tokens to
    its end.

    Source: MiniLLM, arXiv 2306.08543, section 2.2 (length-normalised, discounted return).
    """
    to_go_N = torch.from_numpy(lengths_N)[:, None]
    longest = int(lengths_N.max(initial=0))
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
