"""The ratios of a policy-gradient term: -ratio * advantage of a sampled token. No torch.

Every class here is a mapping in a recipe; its `kind` says which.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, assert_never

from annotated_types import Gt

from megatron_opd.contracts.ranges import Fraction, PositiveFloat
from megatron_opd.methods.part import Around, Needs, RatioPart

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_opd.methods.tokens import Tokens


@dataclass(frozen=True)
class ClippedRatio(RatioPart):
    """rho = p(token) / p_anchor(token) under PPO's clip: to the step's first weights, to the
    sampler, of a sequence."""

    # sequence: the geometric mean over the sequence (GSPO)
    kind: Literal["old", "rollout", "sequence"]
    clip_low: PositiveFloat | None = 0.2  # null: not clipped on this side
    clip_high: PositiveFloat | None = 0.2  # null: not clipped on this side
    dual_clip: Annotated[float, Gt(1)] | None = None  # at most this times |A| where A is negative

    formula = (
        "`rho = e^(S - O)`, or to B, with PPO's clip and the dual clip; `sequence`, GSPO: its "
        "geometric mean over the response, with the token's gradient"
    )

    def needs(self) -> Needs:
        return Needs(sampler=self.kind == "rollout")

    def check(self, key: str, around: Around) -> list[str]:
        if self.kind == "rollout" or around.updates_per_step > 1:
            return []
        usual = ClippedRatio("old")
        changed = [
            name
            for name in ("clip_low", "clip_high")
            if getattr(self, name) not in (None, getattr(usual, name))
        ]
        return [
            f"{key}.{name}: no effect with train.updates_per_step=1: the ratio is 1"
            for name in changed
        ]

    def loss(self, tokens: "Tokens", advantages_T: "Tensor") -> "tuple[Tensor, Tensor]":
        rho_T = self._log_rho(tokens).exp()
        return clipped(rho_T, advantages_T, self.clip_low, self.clip_high, self.dual_clip)

    def _log_rho(self, tokens: "Tokens") -> "Tensor":
        student_T = tokens.logprob("current")
        match self.kind:
            case "rollout":
                return student_T - tokens.logprob("rollout")
            case "old":
                return student_T - tokens.logprob("old")
            case "sequence":
                # GSPO, arXiv 2507.18071, Eq. 14: the sequence's value, the token's gradient.
                mean_T = tokens.mean_over_rows(student_T - tokens.logprob("old"))
                return mean_T + student_T - student_T.detach()
            case _:
                assert_never(self.kind)


@dataclass(frozen=True)
class DetachedRatio(RatioPart):
    """A clipped, detached rho times log p(token): CISPO. No token loses its gradient."""

    kind: Literal["detached"]
    clip_low: PositiveFloat | None = None  # the ratio is at least 1 - clip_low; null: at least 0
    clip_high: PositiveFloat = 5.0  # the ratio is at most 1 + clip_high

    formula = "`sg[clip(rho)] S`"

    def loss(self, tokens: "Tokens", advantages_T: "Tensor") -> "tuple[Tensor, Tensor]":
        """CISPO, arXiv 2506.13585."""
        student_T = tokens.logprob("current")
        rho_T = (student_T - tokens.logprob("old")).detach().exp()
        lowest = 0.0 if self.clip_low is None else 1 - self.clip_low
        weight_T = rho_T.clamp(lowest, 1 + self.clip_high)
        return -weight_T * advantages_T * student_T, nowhere(tokens)


@dataclass(frozen=True)
class TeacherRatio(RatioPart):
    """log r = alpha (S - O) + (1 - alpha) clamp(S - T): TRRD. alpha = 1 is GRPO; the clip bites
    from the start."""

    kind: Literal["teacher_mixture"]
    alpha: Fraction = 0.5  # the old student's share; the rest is the teacher's
    clamp: PositiveFloat = 1.0  # bound of |S - T|
    clip_low: PositiveFloat = 0.2  # the ratio counts down to 1 - clip_low
    clip_high: PositiveFloat = 0.2  # the ratio counts up to 1 + clip_high

    formula = (
        "`e^(alpha (S - O) + (1 - alpha) clamp(S - T))`; already at the first update it is not 1, "
        "and clips"
    )

    def needs(self) -> Needs:
        return Needs(teacher=True)

    def teaches(self) -> bool:
        return True

    def loss(self, tokens: "Tokens", advantages_T: "Tensor") -> "tuple[Tensor, Tensor]":
        """TRRD, arXiv 2602.22495, Eq. 3 with the clamp of its appendix B."""
        student_T = tokens.logprob("current")
        to_teacher_T = (student_T - tokens.logprob("teacher")).clamp(-self.clamp, self.clamp)
        to_old_T = student_T - tokens.logprob("old")
        rho_T = (self.alpha * to_old_T + (1 - self.alpha) * to_teacher_T).exp()
        return clipped(rho_T, advantages_T, self.clip_low, self.clip_high)


@dataclass(frozen=True)
class ShapedProbability(RatioPart):
    """p / (p + gamma) of tokens the student did not sample: LUFFY's off-policy part. Read on traces
    alone."""

    kind: Literal["shaped"]
    gamma: PositiveFloat = 0.1  # the probability at which the factor is a half

    formula = "`e^S / (e^S + gamma)`, of tokens of traces"

    def needs(self) -> Needs:
        return Needs(traces=True)

    def loss(self, tokens: "Tokens", advantages_T: "Tensor") -> "tuple[Tensor, Tensor]":
        """LUFFY, arXiv 2504.14945, with the behaviour's probability taken as 1."""
        p_T = tokens.logprob("current").exp()
        return -p_T / (p_T + self.gamma) * advantages_T, nowhere(tokens)


@dataclass(frozen=True)
class NoRatio(RatioPart):
    """log p(token): the score function of strictly on-policy samples."""

    kind: Literal["none"]

    formula = "`S`"

    def loss(self, tokens: "Tokens", advantages_T: "Tensor") -> "tuple[Tensor, Tensor]":
        return -advantages_T * tokens.logprob("current"), nowhere(tokens)


@dataclass(frozen=True)
class TeacherEstimate(RatioPart):
    """An estimate from the token of how far the teacher is, differentiated; the advantage is its
    weight.

    teacher_gap: T - S, whose gradient is that of -S: the teacher's half is a number. SDAR.
    teacher_k3: rho k3 of KL(student, teacher), through both, whose gradient is the reverse KL's.
    Skill-SD.
    """

    # the estimate: the gap itself, or k3 of the reverse KL
    kind: Literal["teacher_gap", "teacher_k3"]

    formula = "`S - T`; `teacher_k3`: `-rho (e^(T - S) - 1 + S - T)`, through both"

    def needs(self) -> Needs:
        return Needs(teacher=True)

    def teaches(self) -> bool:
        return self.kind == "teacher_k3"

    def measures(self) -> bool:
        return self.kind == "teacher_k3"

    def loss(self, tokens: "Tokens", advantages_T: "Tensor") -> "tuple[Tensor, Tensor]":
        """The loss of SDAR's released code, with the bounds of its exponents."""
        student_T = tokens.logprob("current")
        gap_T = tokens.logprob("teacher") - student_T
        if self.kind == "teacher_gap":
            return advantages_T * gap_T, nowhere(tokens)
        k3_T = gap_T.clamp(max=20).exp() - 1 - gap_T
        rho_T = (student_T - tokens.logprob("old")).clamp(max=10).exp()
        return advantages_T * rho_T * k3_T, nowhere(tokens)


Ratio = ClippedRatio | DetachedRatio | TeacherRatio | ShapedProbability | NoRatio | TeacherEstimate


def nowhere(tokens: "Tokens") -> "Tensor":
    """No token's gradient is stopped; bool [T]."""
    return tokens.sampled_T & False


def clipped(
    rho_T: "Tensor",
    advantages_T: "Tensor",
    low: float | None,
    high: float | None,
    dual: float | None = None,
) -> "tuple[Tensor, Tensor]":
    """PPO's surrogate: -min(rho A, clip(rho, 1 - low, 1 + high) A); with `dual`, at most dual |A|
    where A < 0.

    Returns the loss and where the clip holds, both [T]. The gradient goes through rho, except where
    it is clipped. Source: GRPO, arXiv 2402.03300, Eq. 3; dual clip: arXiv 1912.09729.
    """
    free_T = -rho_T * advantages_T
    bounded_T = rho_T
    if low is not None:
        bounded_T = bounded_T.clamp(min=1 - low)
    if high is not None:
        bounded_T = bounded_T.clamp(max=1 + high)
    loss_T = free_T.maximum(-bounded_T * advantages_T)
    if dual is not None:
        loss_T = loss_T.minimum((-dual * advantages_T).where(advantages_T < 0, math.inf))
    return loss_T, loss_T.detach() != free_T.detach()
