"""The ratios of a policy-gradient term: -ratio * advantage of a sampled token. No torch.

Formulas: docs/methods.md. Every class here is a mapping in a recipe; its `kind` says which.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Gt

from megatron_opd.contracts.ranges import Fraction, PositiveFloat


@dataclass(frozen=True)
class ClippedRatio:
    """rho = p(token) / p_anchor(token) under PPO's clip: to the step's first weights, to the
    sampler, of a sequence."""

    # sequence: the geometric mean over the sequence (GSPO)
    kind: Literal["old", "rollout", "sequence"]
    clip_low: PositiveFloat | None = 0.2  # null: not clipped on this side
    clip_high: PositiveFloat | None = 0.2
    dual_clip: Annotated[float, Gt(1)] | None = None  # at most this times |A| where A is negative


@dataclass(frozen=True)
class DetachedRatio:
    """A clipped, detached rho times log p(token): CISPO. No token loses its gradient."""

    kind: Literal["detached"]
    clip_low: PositiveFloat | None = None
    clip_high: PositiveFloat = 5.0


@dataclass(frozen=True)
class TeacherRatio:
    """log r = alpha (S - O) + (1 - alpha) clamp(S - T): TRRD. alpha = 1 is GRPO; the clip bites
    from the start."""

    kind: Literal["teacher_mixture"]
    alpha: Fraction = 0.5
    clamp: PositiveFloat = 1.0  # bound of |S - T|
    clip_low: PositiveFloat = 0.2
    clip_high: PositiveFloat = 0.2


@dataclass(frozen=True)
class ShapedProbability:
    """p / (p + gamma) of tokens the student did not sample: LUFFY's off-policy part. Read on traces
    alone."""

    kind: Literal["shaped"]
    gamma: PositiveFloat = 0.1


@dataclass(frozen=True)
class NoRatio:
    """log p(token): the score function of strictly on-policy samples."""

    kind: Literal["none"]


Ratio = ClippedRatio | DetachedRatio | TeacherRatio | ShapedProbability | NoRatio
