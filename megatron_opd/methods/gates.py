"""Gates: factors that say which tokens a term counts, and how much. No torch.

Every class here is a mapping in a recipe; its `kind` says which. `invert` is 1 - gate.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, assert_never

import numpy as np
from annotated_types import Gt, Le

from megatron_opd.contracts.ranges import NonNegativeFloat
from megatron_opd.errors import ConfigError
from megatron_opd.methods.part import Around, GatePart, Needs, When
from megatron_opd.methods.scales import DriftGate, SourceSpreadGate, TurnBalanceGate

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_opd.methods.tokens import Tokens


@dataclass(frozen=True)
class EntropyQuantileGate(GatePart):
    """The tokens with the highest student entropy of the update's whole batch."""

    kind: Literal["entropy_quantile"]
    top: Annotated[float, Gt(0), Le(1)] = 0.2  # share of the tokens that count
    invert: bool = False

    formula = "`1[H_S among the top share of the update]`"

    def needs(self) -> Needs:
        return Needs(student_pass=True)

    def value(self, tokens: "Tokens") -> "Tensor":
        return highest(tokens.entropy("student"), tokens.sampled_T, self.top)


@dataclass(frozen=True)
class LogprobQuantileGate(GatePart):
    """The tokens to which the student gave the lowest probability, of the update's whole batch."""

    kind: Literal["logprob_quantile"]
    bottom: Annotated[float, Gt(0), Le(1)] = 0.2  # share of the tokens that count
    invert: bool = False

    formula = "`1[O among the bottom share of the update]`"

    def needs(self) -> Needs:
        return Needs(student_pass=True)

    def value(self, tokens: "Tokens") -> "Tensor":
        return highest(-tokens.logprob("old"), tokens.sampled_T, self.bottom)


@dataclass(frozen=True)
class EntropyGate(GatePart):
    """Entropy above a threshold, in nats."""

    kind: Literal["entropy"]
    above: NonNegativeFloat  # nats; below the logarithm of the vocabulary size
    model: Literal["student", "teacher"] = "teacher"  # whose entropy
    invert: bool = False

    formula = "`1[H_T > above]`, or of `H_S`"

    def needs(self) -> Needs:
        of_teacher = self.model == "teacher"
        return Needs(teacher=of_teacher, student_pass=not of_teacher)

    def check_vocabulary(self, key: str, vocab_size: int) -> None:
        largest = math.log(vocab_size)
        if self.above >= largest:
            raise ConfigError(
                f"{key}.above: {self.above} nats are no less than the largest entropy of "
                f"{vocab_size} tokens, {largest:.2f}, so no token is kept; lower it"
            )

    def value(self, tokens: "Tokens") -> "Tensor":
        return tokens.entropy(self.model) > self.above


@dataclass(frozen=True)
class LogRatioGate(GatePart):
    """log p_teacher - log p_student of the token is at least a threshold."""

    kind: Literal["log_ratio"]
    at_least: float  # nats; 0: what the teacher finds no less likely
    invert: bool = False

    formula = "`1[T - O >= at_least]`"

    def needs(self) -> Needs:
        return Needs(teacher=True, student_pass=True)

    def teaches(self) -> bool:
        return True

    def value(self, tokens: "Tokens") -> "Tensor":
        return tokens.log_ratio("teacher", "old") >= self.at_least


@dataclass(frozen=True)
class ProbabilityGapGate(GatePart):
    """p_teacher - p_student of the token is at most a threshold: AOPD."""

    kind: Literal["probability_gap"]
    at_most: float = 0.0  # a difference of probabilities, between -1 and 1
    invert: bool = False

    formula = "`1[e^T - e^O <= at_most]`"

    def needs(self) -> Needs:
        return Needs(teacher=True, student_pass=True)

    def teaches(self) -> bool:
        return True

    def check(self, key: str, around: Around) -> list[str]:
        if not -1 < self.at_most < 1:
            raise ConfigError(
                f"{key}.at_most: {self.at_most} splits no tokens, a difference of probabilities "
                "lies between -1 and 1"
            )
        return []

    def value(self, tokens: "Tokens") -> "Tensor":
        return tokens.logprob("teacher").exp() - tokens.logprob("old").exp() <= self.at_most


@dataclass(frozen=True)
class TrustGate(GatePart):
    """TrOPD's trust region: 1 with probability min(p_teacher / p_student, 1), drawn once per
    rollout."""

    kind: Literal["trust"]
    expected: bool = False  # the probability itself in the place of the draw
    invert: bool = False

    formula = "`1[u < min(e^(T - O), 1)]`, u drawn once per token"

    def needs(self) -> Needs:
        return Needs(teacher=True, student_pass=True)

    def teaches(self) -> bool:
        return True

    def value(self, tokens: "Tokens") -> "Tensor":
        trust_T = tokens.log_ratio("teacher", "old").exp().clamp(max=1.0)
        return trust_T if self.expected else tokens.uniform_T < trust_T


@dataclass(frozen=True)
class SigmoidGate(GatePart):
    """sigmoid(beta * signal): SDAR. The signal is log p_teacher - log p_student of the token, the
    student's entropy, or either of them (soft_or), each brought to the range from 0 to 1."""

    kind: Literal["sigmoid"]
    beta: NonNegativeFloat = 5.0  # how steep; 0: a half everywhere
    signal: Literal["log_ratio", "student_entropy", "soft_or"] = "log_ratio"  # what is judged by
    # the student before the step's first update, or as it is now: SDAR as released
    anchor: Literal["old", "current"] = "old"
    invert: bool = False

    formula = (
        "`sigmoid(beta (T - O))`, of `H_S`, or of `1 - e^(-H_S) / (1 + e^(T - O))`; within the "
        "update with `anchor: current`"
    )

    def needs(self) -> Needs:
        before = self.anchor == "old"
        return Needs(teacher=self.signal != "student_entropy", student_pass=before)

    def when(self) -> When:
        return "before" if self.anchor == "old" else "within"

    def teaches(self) -> bool:
        return self.signal != "student_entropy" and self.beta > 0

    def value(self, tokens: "Tokens") -> "Tensor":
        return (self.beta * self._signal(tokens)).sigmoid()

    def _signal(self, tokens: "Tokens") -> "Tensor":
        match self.signal:
            case "log_ratio":
                return tokens.log_ratio("teacher", self.anchor)
            case "student_entropy":
                return tokens.entropy("student")
            case "soft_or":
                disbelieved_T = (-tokens.log_ratio("teacher", self.anchor)).sigmoid()
                return 1 - (-tokens.entropy("student")).exp() * disbelieved_T
            case _:
                assert_never(self.signal)


@dataclass(frozen=True)
class WrongGate(GatePart):
    """Responses with a reward of 0, or those of groups in which every reward is 0."""

    kind: Literal["wrong"]
    # a response counts by its own reward, or by those of its group
    scope: Literal["response", "group"] = "response"
    invert: bool = False

    formula = "`1[r = 0]`, or of the group's largest r"

    def needs(self) -> Needs:
        return Needs(rewards=True)

    def value(self, tokens: "Tokens") -> "Tensor":
        rewards_N = tokens.rewards_N
        if self.scope == "group":
            groups_N = tokens.groups_N
            best = {group: rewards_N[groups_N == group].max() for group in set(groups_N.tolist())}
            rewards_N = np.array([best[group] for group in groups_N.tolist()])
        return tokens.spread(rewards_N == 0)


@dataclass(frozen=True)
class EndGate(GatePart):
    """Every token but the end-of-sequence token, where student and teacher end differently."""

    kind: Literal["not_end"]
    invert: bool = False

    formula = "`1[the token is no end]`"

    def value(self, tokens: "Tokens") -> "Tensor":
        return ~tokens.end_T


@dataclass(frozen=True)
class FinishedGate(GatePart):
    """Responses that ended by themselves, not at the length limit."""

    kind: Literal["finished"]
    invert: bool = False

    formula = "`1[the response ended by itself]`"

    def value(self, tokens: "Tokens") -> "Tensor":
        return tokens.finished_T


Gate = (
    EntropyQuantileGate
    | LogprobQuantileGate
    | EntropyGate
    | LogRatioGate
    | ProbabilityGapGate
    | TrustGate
    | SigmoidGate
    | WrongGate
    | EndGate
    | FinishedGate
    | DriftGate
    | TurnBalanceGate
    | SourceSpreadGate
)


def highest(values_T: "Tensor", among_T: "Tensor", share: float) -> "Tensor":
    """The ceil(share * n) largest values among the n tokens that count, and those equal to the
    smallest of them; bool [T]."""
    candidates = values_T[among_T]
    if not len(candidates):
        return among_T
    threshold = candidates.topk(math.ceil(share * len(candidates))).values[-1]
    return among_T & (values_T >= threshold)
