"""Policy-gradient estimators: a ratio that carries the gradient, an advantage that does not, and a
clip."""

from dataclasses import dataclass
from typing import assert_never

import torch
from torch import Tensor

from megatron_opd.mcore.batch import Columns
from megatron_opd.methods.ratios import (
    ClippedRatio,
    DetachedRatio,
    NoRatio,
    Ratio,
    ShapedProbability,
    TeacherRatio,
)
from megatron_opd.objective.advantages import LOWEST


@dataclass(frozen=True)
class Policies:
    """Logprobs of T tokens under the policies a ratio is made of."""

    student_T: Tensor  # carries the gradient
    old_T: Tensor
    columns: Columns


def policy_gradient(
    ratio: Ratio, policies: Policies, advantages_T: Tensor
) -> tuple[Tensor, Tensor]:
    """The loss per token, and where a clip stops the gradient (bool)."""
    student_T = policies.student_T
    unclipped_T = torch.zeros_like(student_T, dtype=torch.bool)
    match ratio:
        case NoRatio():
            return -advantages_T * student_T, unclipped_T
        # LUFFY, arXiv 2504.14945: pi / (pi + gamma), the behaviour's probability taken as 1
        case ShapedProbability():
            p_T = student_T.exp()
            return -p_T / (p_T + ratio.gamma) * advantages_T, unclipped_T
        case DetachedRatio():  # CISPO, arXiv 2506.13585
            rho_T = (student_T - policies.old_T).detach().exp()
            weight_T = rho_T.clamp(
                0.0 if ratio.clip_low is None else 1 - ratio.clip_low, 1 + ratio.clip_high
            )
            return -weight_T * advantages_T * student_T, unclipped_T
        case TeacherRatio():  # TRRD, arXiv 2602.22495, Eq. 3 with the clamp of its appendix B
            assert policies.columns.teacher_logprobs_T is not None, "the plan asks for the teacher"
            teacher_T = policies.columns.teacher_logprobs_T.clamp(min=LOWEST)
            of_teacher_T = (student_T - teacher_T).clamp(-ratio.clamp, ratio.clamp)
            rho_T = (
                ratio.alpha * (student_T - policies.old_T) + (1 - ratio.alpha) * of_teacher_T
            ).exp()
            return clipped(rho_T, advantages_T, ratio.clip_low, ratio.clip_high)
        case ClippedRatio():
            rho_T = _importance(ratio, policies).exp()
            return clipped(rho_T, advantages_T, ratio.clip_low, ratio.clip_high, ratio.dual_clip)
        case _:
            assert_never(ratio)


def _importance(ratio: ClippedRatio, policies: Policies) -> Tensor:
    """log rho, [T]."""
    if ratio.kind == "rollout":
        assert policies.columns.rollout_logprobs_T is not None, (
            "sampled tokens have the sampler's logprobs"
        )
        return policies.student_T - policies.columns.rollout_logprobs_T
    log_rho_T = policies.student_T - policies.old_T
    if ratio.kind == "old":
        return log_rho_T
    # GSPO, arXiv 2507.18071, Eq. 14: the sequence's value, the token's gradient. A sequence is
    # within one micro-batch.
    sampled_T = policies.columns.sampled_T
    counted_T = sampled_T.to(log_rho_T.dtype)
    sum_T, tokens_T = policies.columns.over_sequences(
        torch.stack([log_rho_T.where(sampled_T, 0.0), counted_T])
    )
    mean_T = sum_T / tokens_T.clamp(min=1)
    return mean_T + policies.student_T - policies.student_T.detach()


def clipped(
    rho_T: Tensor,
    advantages_T: Tensor,
    low: float | None,
    high: float | None,
    dual: float | None = None,
) -> tuple[Tensor, Tensor]:
    """PPO's surrogate: -min(rho A, clip(rho, 1 - low, 1 + high) A); with `dual`, at most dual |A|
    where A < 0.

    Gradient: through rho, except where clipped. Source: GRPO, arXiv 2402.03300, Eq. 3; dual clip:
    arXiv 1912.09729.
    """
    free_T = -rho_T * advantages_T
    bounded_T = rho_T if low is None and high is None else rho_T.clamp(
        None if low is None else 1 - low, None if high is None else 1 + high
    )  # fmt: skip
    loss_T = torch.maximum(free_T, -bounded_T * advantages_T)
    if dual is not None:
        ceiling_T = torch.where(advantages_T < 0, -dual * advantages_T, torch.inf)
        loss_T = torch.minimum(loss_T, ceiling_T)
    return loss_T, loss_T.detach() != free_T.detach()
