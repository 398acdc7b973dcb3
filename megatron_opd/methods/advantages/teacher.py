"""Advantages from what another model, mostly the teacher, gives a token. No torch."""

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal, Self, assert_never

from annotated_types import Gt, Le, Lt

from megatron_opd.contracts.ranges import Fraction, PositiveFloat, PositiveInt
from megatron_opd.errors import ConfigError
from megatron_opd.methods.part import AdvantagePart, Around, Needs, When
from megatron_opd.methods.schedules import SignedWeight, Weight

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_opd.methods.tokens import Tokens


@dataclass(frozen=True)
class LogRatioAdvantage(AdvantagePart):
    """f(D), D = log p_model(token) - log p_student(token), detached.

    f: identity: D (reverse KL). floor: max(D, ln(mix) / (1 - mix)). mixture: (1 - mix) ln(1 - mix +
    mix e^D) (JSD).
    expm1: e^D - 1 (forward KL); 0 where k3, e^D - 1 - D, is above `k3_limit`.
    """

    kind: Literal["log_ratio"]
    weight: SignedWeight = 1.0
    model: Literal["teacher", "reference"] = "teacher"  # reference: the student as the run found it
    transform: Literal["identity", "floor", "mixture", "expm1"] = "identity"  # f, as above
    mix: Annotated[float, Gt(0), Le(1)] | None = None  # of floor and mixture
    k3_limit: PositiveFloat | None = None  # of expm1; verl's cut-off is 10
    # the student: now, at the step's start, as it sampled
    anchor: Literal["current", "old", "rollout"] = "current"
    # weight of the next token's return: the sum to the end of the sequence; needs an anchor
    discount: Fraction = 0.0
    mean_to_go: bool = False  # that sum over the number of tokens to the end

    formula = "`f(D)`, see below; with a `discount` its sum to the end of the response"

    def needs(self) -> Needs:
        of_teacher = self.model == "teacher"
        return Needs(
            teacher=of_teacher,
            reference=not of_teacher,
            sampler=self.anchor == "rollout",
            student_pass=self.discount > 0 and self.anchor == "old",
        )

    def when(self) -> When:
        return "before" if self.discount else "within"

    def teaches(self) -> bool:
        return self.model == "teacher"

    def check(self, key: str, around: Around) -> list[str]:
        if (self.mix is not None) != (self.transform in ("floor", "mixture")):
            raise ConfigError(
                f"{key}.mix: belongs to transform=floor and transform=mixture, and to these alone"
            )
        if self.k3_limit is not None and self.transform != "expm1":
            raise ConfigError(f"{key}.k3_limit: belongs to transform=expm1 alone; remove it")
        if self.discount and self.anchor == "current":
            raise ConfigError(
                f"{key}.anchor: returns are of the student before the update; set old or rollout"
            )
        if self.mean_to_go and not self.discount:
            raise ConfigError(f"{key}.mean_to_go: no effect with discount=0; remove it")
        if self.mix == 1:
            raise ConfigError(f"{key}.mix: must be below 1")
        return super().check(key, around)

    def value(self, tokens: "Tokens") -> "Tensor":
        value_T = self.transformed(tokens.log_ratio(self.model, self.anchor))
        if not self.discount:
            return value_T
        value_T = value_T.masked_fill(~tokens.sampled_T, 0.0)
        return tokens.to_go(value_T, self.discount, mean=self.mean_to_go)

    def transformed(self, delta_T: "Tensor") -> "Tensor":
        """f(D): with -sg[f(D)] log p as the loss, the expected gradient is that of a divergence.

        identity: reverse KL. expm1: forward KL. mixture: (1 - b) ln(1 - b + b e^D), the JSD with
        beta = b. floor: REOPOLD's lower bound ln(l) / (1 - l), arXiv 2603.11137, Eq. 5 and 7.
        """
        match self.transform:
            case "identity":
                return delta_T
            case "expm1":
                value_T = delta_T.expm1()
                if self.k3_limit is None:
                    return value_T
                return value_T.where(value_T - delta_T <= self.k3_limit, 0.0)
            case "floor":
                assert self.mix is not None, "checked before the run"
                return delta_T.clamp(min=floor(self.mix))
            case "mixture":
                assert self.mix is not None, "checked before the run"
                return (1 - self.mix) * log_mixture(delta_T, self.mix)
            case _:
                assert_never(self.transform)

    def distance(self) -> Self | None:
        return replace(self, weight=1.0) if self.model == "teacher" else None


@dataclass(frozen=True)
class ShapingAdvantage(AdvantagePart):
    """A detached signal added to the advantage: TGPO_R."""

    kind: Literal["shaping"]
    # the student's logprob of the teacher's argmax | 1 where the token is the argmax | the
    # teacher's logprob of it
    signal: Literal["argmax_logprob", "argmax_indicator", "teacher_logprob"]
    weight: Weight = 1.0

    formula = "`sg[S(a)]`, or 1 where the token is `a`, or `T`"

    def needs(self) -> Needs:
        return Needs(teacher=True, argmax=self.signal == "argmax_logprob")

    def when(self) -> When:
        return "within"

    def teaches(self) -> bool:
        return self.signal != "argmax_logprob"

    def value(self, tokens: "Tokens") -> "Tensor":
        match self.signal:
            case "argmax_logprob":
                return tokens.argmax_logprob().detach()
            case "argmax_indicator":
                return tokens.is_argmax_T.float()
            case "teacher_logprob":
                return tokens.logprob("teacher")
            case _:
                assert_never(self.signal)


@dataclass(frozen=True)
class TopKAdvantage(AdvantagePart):
    """Minus the forward KL on the teacher's top-k, as a scalar reward: the other reading of
    TrOPD."""

    kind: Literal["topk_kl"]
    k: PositiveInt  # how many of the teacher's likeliest ids
    weight: Weight = 1.0

    formula = "`-sg[sum_top e^T(v) (T(v) - S(v))]`"

    def needs(self) -> Needs:
        return Needs(teacher=True, topk=self.k)

    def when(self) -> When:
        return "within"

    def fit(self, vocab_size: int) -> Self:
        return replace(self, k=min(self.k, vocab_size))

    def value(self, tokens: "Tokens") -> "Tensor":
        loss_T, _, _ = tokens.topk_forward_kl(self.k, "none")
        return -loss_T.detach()

    def distance(self) -> Self | None:
        return replace(self, weight=1.0)


@dataclass(frozen=True)
class LogRatioFactor(AdvantagePart):
    """Multiplies the sum of the others with 1 - weight + weight * clip(e^(sign(A) D), 1 - clip, 1 +
    clip): RLSD."""

    kind: Literal["log_ratio_factor"]
    weight: Weight = 0.5  # how far the factor may leave 1; 0: it is 1
    clip: PositiveFloat = 0.2  # the factor before the weight lies between 1 - clip and 1 + clip

    formula = "times `1 - w + w clip(e^(sign(A) (T - O)))`"
    last = True

    def needs(self) -> Needs:
        return Needs(teacher=True)

    def when(self) -> When:
        return "within"

    def teaches(self) -> bool:
        return True

    def value(self, tokens: "Tokens") -> "Tensor":
        return tokens.log_ratio("teacher", "old")

    def combine(self, total_T: "Tensor", weight: float, tokens: "Tokens") -> "Tensor":
        return total_T * factor(total_T, self.value(tokens), weight, self.clip)


@dataclass(frozen=True)
class StateAdvantage(AdvantagePart):
    """KL(student, teacher) over the whole vocabulary, detached: beside the log-ratio it is the
    value of the state, which takes variance from the gradient and leaves its expectation. vOPD."""

    kind: Literal["state_kl"]
    weight: SignedWeight = 1.0

    formula = "`sg[KL(student, teacher)]`, a baseline"
    of_state = True

    def needs(self) -> Needs:
        return Needs(teacher_head=True)

    def when(self) -> When:
        return "within"

    def check(self, key: str, around: Around) -> list[str]:
        around.refuse_split_vocabularies(key)
        return super().check(key, around)

    def value(self, tokens: "Tokens") -> "Tensor":
        return tokens.divergence("reverse_kl", None, None).detach()


@dataclass(frozen=True)
class ProximalReturnAdvantage(AdvantagePart):
    """TOP-D: r = ln(1 - mix + mix e^D) of the token plus the mean r of the tokens after it, then
    mean 0 and deviation 1 over the tokens of its group. D is to the sampler."""

    kind: Literal["proximal_return"]
    mix: Annotated[float, Gt(0), Lt(1)] = 0.5  # share of the teacher in the proximal teacher
    weight: Weight = 1.0

    formula = "`z(v + mean of v after it)` over the group's tokens, `v = ln(1 - mix + mix e^D)`"

    def needs(self) -> Needs:
        return Needs(teacher=True, sampler=True)

    def teaches(self) -> bool:
        return True

    def value(self, tokens: "Tokens") -> "Tensor":
        """Arithmetic of arXiv 2607.04751, Eq. 8, on sampled tokens alone."""
        sampled_T = tokens.sampled_T.double()
        own_T = log_mixture(tokens.log_ratio("teacher", "rollout"), self.mix) * sampled_T
        later_T = tokens.to_go(own_T, 1.0, mean=False) - own_T
        left_T = tokens.to_go(sampled_T, 1.0, mean=False) - sampled_T
        return_T = (own_T + later_T / left_T.clamp(min=1)) * sampled_T
        group_T = tokens.spread(tokens.groups_N)
        standard_T = return_T * 0
        for group in set(tokens.groups_N.tolist()):
            members_T = (group_T == group) & tokens.sampled_T
            values = return_T[members_T]
            if len(values) > 1:
                deviation = values.std().clamp(min=1e-6)
                standard_T[members_T] = (values - values.mean()) / deviation
        return standard_T


def floor(mix: float) -> float:
    """The limit of log[((1 - l) q + l p) / p] / (1 - l) where the teacher's q goes to 0."""
    return math.log(mix) / (1 - mix)


def log_mixture(delta_T: "Tensor", mix: float) -> "Tensor":
    """ln(1 - mix + mix e^delta) without overflow, [T]."""
    teacher_T = math.log(mix) + delta_T
    largest_T = teacher_T.clamp(min=math.log1p(-mix))
    rest_T = (math.log1p(-mix) - largest_T).exp()
    return largest_T + ((teacher_T - largest_T).exp() + rest_T).log()


def factor(advantages_T: "Tensor", delta_T: "Tensor", weight: float, clip: float) -> "Tensor":
    """RLSD's multiplier, arXiv 2604.03128, Algorithm 1: larger where the teacher agrees with the
    advantage's sign."""
    agreement_T = (advantages_T.sign() * delta_T).exp().clamp(1 - clip, 1 + clip)
    return 1 - weight + weight * agreement_T
