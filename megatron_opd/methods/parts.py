"""What the terms of a method are made of: weights over steps, advantages, ratios, gates,
corrections. No torch.

Formulas: docs/methods.md. Every class here is a mapping in a recipe; its `kind` says which.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Gt, Le

from megatron_opd.contracts.ranges import (
    Fraction,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
)

# How a term's tokens are averaged. "-norm" divides by rollout.max_completion_tokens in the place of
# the length.
Aggregate = Literal[
    "token-mean",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "token-sum",
]


# ------------------------------------------------------------------------------- weights over steps
@dataclass(frozen=True)
class LinearDecay:
    """w(step) = max(start - decay * step, floor); steps count from 0."""

    start: NonNegativeFloat
    decay: NonNegativeFloat
    floor: NonNegativeFloat = 0.0
    kind: Literal["linear"] = "linear"


@dataclass(frozen=True)
class CosineDecay:
    """w(step) = end + (start - end) (1 + cos(pi step / steps)) / 2, and `end` from step `steps`
    on."""

    kind: Literal["cosine"]
    start: NonNegativeFloat
    steps: PositiveInt
    end: NonNegativeFloat = 0.0


@dataclass(frozen=True)
class Switch:
    """w(step) = before while step < at, then after."""

    kind: Literal["switch"]
    before: NonNegativeFloat
    at: PositiveInt
    after: NonNegativeFloat


Weight = NonNegativeFloat | LinearDecay | CosineDecay | Switch


# --------------------------------------------------------------------------------------- advantages
@dataclass(frozen=True)
class RewardAdvantage:
    """The verifier's reward of the sequence against those of its group, the same for each of its
    tokens."""

    kind: Literal["reward"]
    weight: Weight = 1.0
    # divide by the group's deviation | only centre | the reward itself | minus the mean of the
    # others
    normalise: Literal["std", "mean", "none", "leave_one_out"] = "std"
    std_eps: PositiveFloat = 1e-6
    # over this last part of max_completion_tokens up to 1 is taken from the reward: DAPO's soft
    # overlong punishment
    overlong: Fraction = 0.0


@dataclass(frozen=True)
class LogRatioAdvantage:
    """f(D), D = log p_model(token) - log p_student(token), detached.

    f: identity: D (reverse KL). floor: max(D, ln(mix) / (1 - mix)). mixture: (1 - mix) ln(1 - mix +
    mix e^D) (JSD).
    expm1: e^D - 1 (forward KL).
    """

    kind: Literal["log_ratio"]
    weight: Weight = 1.0
    model: Literal["teacher", "reference"] = "teacher"  # reference: the student as the run found it
    transform: Literal["identity", "floor", "mixture", "expm1"] = "identity"
    mix: Annotated[float, Gt(0), Le(1)] | None = None  # of floor and mixture
    # the student: now, at the step's start, as it sampled
    anchor: Literal["current", "old", "rollout"] = "current"
    # weight of the next token's return: the sum to the end of the sequence; needs an anchor
    discount: Fraction = 0.0
    mean_to_go: bool = False  # that sum over the number of tokens to the end


@dataclass(frozen=True)
class ShapingAdvantage:
    """A detached signal added to the advantage: TGPO_R."""

    kind: Literal["shaping"]
    # the student's logprob of the teacher's argmax | 1 where the token is the argmax | the
    # teacher's logprob of it
    signal: Literal["argmax_logprob", "argmax_indicator", "teacher_logprob"]
    weight: Weight = 1.0


@dataclass(frozen=True)
class TopKAdvantage:
    """Minus the forward KL on the teacher's top-k, as a scalar reward: the other reading of
    TrOPD."""

    kind: Literal["topk_kl"]
    k: PositiveInt
    weight: Weight = 1.0


@dataclass(frozen=True)
class ProcessRewardAdvantage:
    """beta (log p_process(token) - log p_reference(token)) of this token and those after it:
    PRIME's implicit rewards.

    The process model begins as the student and is trained beside it, to tell right responses from
    wrong ones: cross-entropy of sigmoid(the response's sum of rewards) with the verifier's reward.
    Each reward is taken relative to the mean of those in the other responses of the group.
    """

    kind: Literal["process_reward"]
    weight: Weight = 1.0
    beta: PositiveFloat = 0.05
    # of the process model; the rest of its optimizer is as train.optimizer
    lr: PositiveFloat = 1e-6
    clip_grad: NonNegativeFloat = 10.0


@dataclass(frozen=True)
class LogRatioFactor:
    """Multiplies the sum of the others with 1 - weight + weight * clip(e^(sign(A) D), 1 - clip, 1 +
    clip): RLSD."""

    kind: Literal["log_ratio_factor"]
    weight: Weight = 0.5
    clip: PositiveFloat = 0.2


Advantage = (
    RewardAdvantage
    | LogRatioAdvantage
    | ShapingAdvantage
    | TopKAdvantage
    | ProcessRewardAdvantage
    | LogRatioFactor
)


# ------------------------------------------------------------------------------------------- ratios
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


# -------------------------------------------------------------------------------------------- gates
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


@dataclass(frozen=True)
class Correction:
    """For sampler and trainer disagreeing on w = p_trainer(token) / p_sampler(token), both at the
    step's first weights.

    truncated: min(w, high). masked: w within [low, high], else 0 (IcePop). sequence_*: the same
    with the product of w over the sequence. geometric: w, but 0 for sequences whose geometric mean
    of w is outside.
    """

    kind: Literal["truncated", "masked", "sequence_truncated", "sequence_masked", "geometric"]
    high: PositiveFloat
    low: NonNegativeFloat = 0.0
