"""Divergences on the teacher's top-k alone, from logprobs under both models' full softmax.

q_k is the teacher's and p_k the student's probability of the teacher's K best ids, Q and P are
their sums. Plain torch on [T, K]: gradients flow through the student's logprobs, which `logprobs`
and `linear_logprobs` give.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Tail = Literal["none", "renormalise", "ghost", "generalised"]


class TruncatedKL(NamedTuple):
    """The loss of each token, float32 [T], in nats, and both models' mass on the K ids."""

    loss_T: Tensor
    teacher_mass_T: Tensor  # Q, detached
    student_mass_T: Tensor  # P, detached


def truncated_forward_kl(
    student_logprobs_TK: Tensor, teacher_logprobs_TK: Tensor, *, tail: Tail
) -> TruncatedKL:
    """Forward KL on K ids per token, float32 [T], in nats.

    `tail` is the treatment of the rest of the vocabulary:
        none         sum q (log q - log p)  (TrOPD, k = 64)
        renormalise  the same with q / Q in the place of q; the student's p stays  (EOPD, k = 16)
        ghost        none + (1 - Q) (log(1 - Q) - log(1 - P)): the rest is one id, so that it is a
                     KL of two distributions
        generalised  none - Q + P: not negative, and 0 only if p = q
    The gradients of `none` and `renormalise` differ by the factor Q. Raises ValueError for shapes
    that differ and for an unknown tail.
    """
    if student_logprobs_TK.shape != teacher_logprobs_TK.shape or student_logprobs_TK.dim() != 2:
        shapes = f"{tuple(student_logprobs_TK.shape)} and {tuple(teacher_logprobs_TK.shape)}"
        raise ValueError(
            f"student_logprobs_TK and teacher_logprobs_TK must both be [T, K], got {shapes}"
        )
    lq_TK = teacher_logprobs_TK.detach()
    q_TK = lq_TK.exp()
    q_T = q_TK.sum(dim=1)
    p_T = student_logprobs_TK.exp().sum(dim=1)
    if tail == "renormalise":
        lq_TK = lq_TK - q_T.log()[:, None]
        q_TK = lq_TK.exp()
    # An id to which the teacher gives no probability adds nothing.
    terms_TK = q_TK * (lq_TK - student_logprobs_TK)
    loss_T = terms_TK.masked_fill(q_TK == 0, 0.0).sum(dim=1)
    if tail == "ghost":
        rest_q_T = _rest(q_T)
        loss_T = loss_T + rest_q_T * (rest_q_T.log() - _rest(p_T).log())
    elif tail == "generalised":
        loss_T = loss_T - q_T + p_T
    elif tail not in ("none", "renormalise"):
        raise ValueError(f"tail={tail!r} is unknown; known: none, renormalise, ghost, generalised")
    return TruncatedKL(loss_T, q_T, p_T.detach())


def _rest(mass_T: Tensor) -> Tensor:
    """1 - mass, kept above the rounding of a sum of float32 probabilities."""
    return (1 - mass_T).clamp(min=torch.finfo(mass_T.dtype).eps)
