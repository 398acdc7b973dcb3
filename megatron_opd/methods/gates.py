"""Which tokens a term counts, and how much: factors from 0 to 1. No torch.

A term multiplies its gates; `invert` is 1 - gate. Formulas: docs/methods.md. Every class here is a
mapping in a recipe; its `kind` says which.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Gt, Le

from megatron_opd.contracts.ranges import NonNegativeFloat


@dataclass(frozen=True)
class EntropyQuantileGate:
    """The tokens with the highest student entropy of the update's whole batch."""

    kind: Literal["entropy_quantile"]
    top: Annotated[float, Gt(0), Le(1)] = 0.2
    invert: bool = False


@dataclass(frozen=True)
class EntropyGate:
    """Entropy above a threshold, in nats."""

    kind: Literal["entropy"]
    above: NonNegativeFloat
    model: Literal["student", "teacher"] = "teacher"
    invert: bool = False


@dataclass(frozen=True)
class LogRatioGate:
    """log p_teacher - log p_student of the token is at least a threshold."""

    kind: Literal["log_ratio"]
    at_least: float
    invert: bool = False


@dataclass(frozen=True)
class ProbabilityGapGate:
    """p_teacher - p_student of the token is at most a threshold: AOPD."""

    kind: Literal["probability_gap"]
    at_most: float = 0.0
    invert: bool = False


@dataclass(frozen=True)
class TrustGate:
    """TrOPD's trust region: 1 with probability min(p_teacher / p_student, 1), drawn once per
    rollout."""

    kind: Literal["trust"]
    expected: bool = False  # the probability itself in the place of the draw
    invert: bool = False


@dataclass(frozen=True)
class SigmoidGate:
    """sigmoid(beta * (log p_teacher - log p_student)) of the token, or of the student's entropy:
    SDAR."""

    kind: Literal["sigmoid"]
    beta: NonNegativeFloat = 5.0
    signal: Literal["log_ratio", "student_entropy"] = "log_ratio"
    invert: bool = False


@dataclass(frozen=True)
class WrongGate:
    """Responses with a reward of 0, or those of groups in which every reward is 0."""

    kind: Literal["wrong"]
    scope: Literal["response", "group"] = "response"
    invert: bool = False


@dataclass(frozen=True)
class EndGate:
    """Every token but the end-of-sequence token, where student and teacher end differently."""

    kind: Literal["not_end"]
    invert: bool = False


@dataclass(frozen=True)
class FinishedGate:
    """Responses that ended by themselves, not at the length limit."""

    kind: Literal["finished"]
    invert: bool = False


Gate = (
    EntropyQuantileGate
    | EntropyGate
    | LogRatioGate
    | ProbabilityGapGate
    | TrustGate
    | SigmoidGate
    | WrongGate
    | EndGate
    | FinishedGate
)
