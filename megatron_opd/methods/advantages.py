"""The advantages of a policy-gradient term: -ratio * advantage of a sampled token. No torch.

A term sums its advantages, then applies its factors; none has a gradient. Formulas:
docs/methods.md. Every class here is a mapping in a recipe; its `kind` says which.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Gt, Le

from megatron_opd.contracts.ranges import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt
from megatron_opd.methods.schedules import Weight


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
