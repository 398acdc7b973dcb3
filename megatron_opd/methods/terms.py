"""The terms of a method. No torch.

A loss is a weighted sum of terms. Terms of five kinds share one forward pass of the student; what
makes the methods of the literature different are the advantages, ratios, gates, corrections and
weights in a term. Those have a file per kind in this folder.
"""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Literal, Self

from annotated_types import Gt, Le

from megatron_opd.contracts.ranges import PositiveInt
from megatron_opd.errors import ConfigError
from megatron_opd.methods.advantages import Advantage, RewardAdvantage
from megatron_opd.methods.corrections import Correction
from megatron_opd.methods.gates import Gate
from megatron_opd.methods.part import Aggregate, Around, Denominator, Needs, TermPart
from megatron_opd.methods.ratios import ClippedRatio, Ratio
from megatron_opd.methods.schedules import Weight, weight_at

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_opd.methods.tokens import Tokens

# Parameters of the whole-vocabulary divergences.
_PARAMETERS = {
    "jsd": ("beta",),
    "skew_forward_kl": ("alpha",),
    "skew_reverse_kl": ("alpha",),
    "alpha_beta": ("alpha", "beta"),
}


@dataclass(frozen=True)
class PolicyGradientTerm(TermPart):
    """-ratio * advantage of the sampled token. A default one is GRPO's."""

    kind: Literal["policy_gradient"]
    weight: Weight = 1.0
    advantages: dict[str, Advantage] = field(
        default_factory=lambda: {"reward": RewardAdvantage("reward")}
    )  # by name: what a sampled token is worth; they are added up
    # the sum of the advantages gets mean 0 and deviation 1 over the update's tokens
    whiten: bool = False
    # how an advantage reaches the student, and where it is clipped
    ratio: Ratio = field(default_factory=lambda: ClippedRatio("old"))
    gates: dict[str, Gate] = field(default_factory=dict)
    correction: Correction | None = None
    aggregate: Aggregate = "token-mean"
    denominator: Denominator = "tokens"

    formula = "`-ratio * sg[advantage]`, clipped as its ratio says"

    def needs(self) -> Needs:
        of_traces = self.ratio.needs().traces
        return Needs(rollouts=not of_traces, traces=of_traces)

    def only_of_samples(self) -> bool:
        return True

    def check(self, key: str, around: Around) -> list[str]:
        warnings = super().check(key, around)
        if not self.advantages:
            raise ConfigError(
                f"{key}.advantages: empty, so the term has no gradient; give one, or remove the "
                "term"
            )
        for name, advantage in self.advantages.items():
            if self.whiten and advantage.when() == "within":
                raise ConfigError(
                    f"{key}.whiten: {name} changes within the update; its advantages must be known "
                    "before it"
                )
        if self.of_traces and self.correction:
            raise ConfigError(f"{key}.correction: no effect on traces; remove it")
        if self.of_traces and not around.traces_per_group:
            raise ConfigError(
                f"{key}.ratio: {self.ratio.kind} is of traces in a group; set "
                "method.traces_per_group"
            )
        of_state = all(advantage.of_state for advantage in self.advantages.values())
        if of_state and not self.gates and not self.ratio.teaches():
            raise ConfigError(
                f"{key}.advantages: the same for every token that could stand at a place, so the "
                "expected gradient is 0; add a gate, or another advantage"
            )
        return warnings

    def fit(self, vocab_size: int) -> Self:
        fitted = {name: part.fit(vocab_size) for name, part in self.advantages.items()}
        return replace(self, advantages=fitted)

    def at(self, step: int) -> Self:
        """Without the advantages that have a weight of 0 at `step`."""
        left = {
            name: part
            for name, part in self.advantages.items()
            if weight_at(part.weight, step) != 0
        }
        return replace(self, advantages=left)

    def fixed(self, tokens: "Tokens") -> "Tensor":
        return self._combined(tokens, "before", tokens.zeros_T)

    def loss(self, tokens: "Tokens", fixed_T: "Tensor") -> "tuple[Tensor, dict[str, Tensor]]":
        advantages_T = self._combined(tokens, "within", fixed_T).detach()
        loss_T, clipped_T = self.ratio.loss(tokens, advantages_T)
        return loss_T, {"clip_fraction": clipped_T, "advantage": advantages_T}

    def _combined(self, tokens: "Tokens", when: str, total_T: "Tensor") -> "Tensor":
        """The advantages of one moment upon those before it, factors behind the others."""
        now = [part for part in self.advantages.values() if part.when() == when]
        for part in sorted(now, key=lambda part: part.last):
            total_T = part.combine(total_T, weight_at(part.weight, tokens.step), tokens)
        return total_T

    def distance(self, vocab_size: int) -> TermPart | None:
        advantages = {
            name: distance
            for name, part in self.advantages.items()
            if (distance := part.distance())
        }
        if self.ratio.measures():
            advantages = self.advantages
        if not advantages:
            return None
        # Divided by its deviation, an advantage of zeros would be noise.
        return replace(
            self, weight=1.0, gates={}, correction=None, whiten=False, advantages=advantages
        )


@dataclass(frozen=True)
class CrossEntropyTerm(TermPart):
    """-log p_student(target): the teacher's argmax token on the student's prefix, or the next token
    of a trace."""

    kind: Literal["cross_entropy"]
    targets: Literal["teacher_argmax", "trace"]  # the teacher's likeliest token, or a trace's
    weight: Weight = 1.0
    gates: dict[str, Gate] = field(default_factory=dict)
    correction: Correction | None = None
    aggregate: Aggregate = "token-mean"
    denominator: Denominator = "tokens"

    formula = "`-S(a)`, or `-S` of the tokens of a trace"

    def needs(self) -> Needs:
        if self.targets == "trace":
            return Needs(traces=True)
        return Needs(rollouts=True, teacher=True, argmax=True)

    def teaches(self) -> bool:
        return self.targets == "teacher_argmax"

    def loss(self, tokens: "Tokens", fixed_T: "Tensor") -> "tuple[Tensor, dict[str, Tensor]]":
        if self.targets == "trace":
            return -tokens.logprob("current"), {}
        return -tokens.argmax_logprob(), {}


@dataclass(frozen=True)
class TopKTerm(TermPart):
    """A divergence on the teacher's k best ids, differentiated through the student's
    log-probabilities of them.

    jsd_teacher_side: beta sum q (log q - log m), m = beta q + (1 - beta) p: the first half of
    TrOPD's JSD.
    """

    kind: Literal["topk"]
    k: PositiveInt  # how many of the teacher's likeliest ids
    weight: Weight = 1.0
    divergence: Literal["forward_kl", "jsd_teacher_side"] = "forward_kl"  # the JSD: as above
    # of forward_kl: the rest of the vocabulary
    tail: Literal["none", "renormalise", "ghost", "generalised"] = "none"
    beta: Annotated[float, Gt(0), Le(1)] | None = None  # of jsd_teacher_side
    divide_by_k: bool = False  # the loss over k, as some codes average over ids
    gates: dict[str, Gate] = field(default_factory=dict)
    correction: Correction | None = None
    aggregate: Aggregate = "token-mean"
    denominator: Denominator = "tokens"

    formula = (
        "`sum_top e^T(v) (T(v) - S(v))`; `tail` says what becomes of the rest of the vocabulary"
    )

    def needs(self) -> Needs:
        return Needs(rollouts=True, teacher=True, topk=self.k)

    def teaches(self) -> bool:
        return True

    def check(self, key: str, around: Around) -> list[str]:
        if (self.beta is None) != (self.divergence == "forward_kl"):
            raise ConfigError(
                f"{key}.beta: belongs to divergence=jsd_teacher_side, and to it alone"
            )
        if self.divergence != "forward_kl" and self.tail != "none":
            raise ConfigError(f"{key}.tail: no effect with divergence={self.divergence}; remove it")
        return super().check(key, around)

    def fit(self, vocab_size: int) -> Self:
        return replace(self, k=min(self.k, vocab_size))

    def loss(self, tokens: "Tokens", fixed_T: "Tensor") -> "tuple[Tensor, dict[str, Tensor]]":
        if self.divergence == "jsd_teacher_side":
            assert self.beta is not None, "checked before the run"
            student_TK, teacher_TK = tokens.topk(self.k)
            loss_T = jsd_teacher_side(student_TK, teacher_TK, self.beta)
            facts = {"teacher_mass": teacher_TK.exp().sum(dim=1)}
        else:
            loss_T, teacher_mass_T, student_mass_T = tokens.topk_forward_kl(self.k, self.tail)
            facts = {"teacher_mass": teacher_mass_T, "student_mass": student_mass_T}
        return loss_T / self.k if self.divide_by_k else loss_T, facts

    def distance(self, vocab_size: int) -> TermPart:
        """On fewer ids than all, its gradient is that of the mass that the student leaves out."""
        return replace(self, weight=1.0, gates={}, correction=None, k=vocab_size)


@dataclass(frozen=True)
class DivergenceTerm(TermPart):
    """A divergence over the whole vocabulary. No pipeline stages; the teacher's TP size is 1 or the
    student's."""

    kind: Literal["divergence"]
    divergence: Literal[
        "forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd", "alpha_beta"
    ]  # fmt: skip
    weight: Weight = 1.0
    alpha: float | None = None  # a skewed KL's share of its first model; the teacher's power
    beta: float | None = None  # of jsd the teacher's share; of alpha_beta the student's power
    gates: dict[str, Gate] = field(default_factory=dict)
    aggregate: Aggregate = "token-mean"
    denominator: Denominator = "tokens"

    formula = "a divergence of the two whole distributions"

    def needs(self) -> Needs:
        return Needs(rollouts=True, teacher_head=True)

    def teaches(self) -> bool:
        return True

    def check(self, key: str, around: Around) -> list[str]:
        warnings = super().check(key, around)
        parameters = _PARAMETERS.get(self.divergence, ())
        for name in ("alpha", "beta"):
            value = getattr(self, name)
            if (value is None) == (name in parameters):
                problem = "missing" if value is None else "no effect"
                raise ConfigError(f"{key}.{name}: {problem} with {self.divergence}")
            if value is not None and self.divergence != "alpha_beta" and not 0 < value < 1:
                raise ConfigError(f"{key}.{name}: {value} must lie between 0 and 1")
        total = (self.alpha or 0) + (self.beta or 0)
        if self.divergence == "alpha_beta" and 0 in (self.alpha, self.beta, total):
            raise ConfigError(f"{key}.alpha: alpha, beta and their sum must not be 0")
        around.refuse_split_vocabularies(key)
        return warnings

    def loss(self, tokens: "Tokens", fixed_T: "Tensor") -> "tuple[Tensor, dict[str, Tensor]]":
        return tokens.divergence(self.divergence, self.alpha, self.beta), {}

    def distance(self, vocab_size: int) -> TermPart | None:
        """Total variation has no gradient at 0."""
        return None if self.divergence == "tvd" else replace(self, weight=1.0, gates={})


@dataclass(frozen=True)
class EntropyTerm(TermPart):
    """Minus the student's entropy: a bonus for staying undecided."""

    kind: Literal["entropy"]
    weight: Weight = 1e-3
    aggregate: Aggregate = "token-mean"

    formula = "`-H_S`"

    def needs(self) -> Needs:
        return Needs(rollouts=True)

    def loss(self, tokens: "Tokens", fixed_T: "Tensor") -> "tuple[Tensor, dict[str, Tensor]]":
        return -tokens.entropy("student"), {}


Term = PolicyGradientTerm | CrossEntropyTerm | TopKTerm | DivergenceTerm | EntropyTerm


def jsd_teacher_side(student_TK: "Tensor", teacher_TK: "Tensor", beta: float) -> "Tensor":
    """beta sum_k q_k (log q_k - log m_k), m = beta q + (1 - beta) p; float32 [T].

    The first half of the JSD row of TrOPD as printed. Its exact gradient is
    `LogRatioAdvantage(transform="mixture")`.
    """
    q_TK = teacher_TK.detach().exp()
    m_TK = beta * q_TK + (1 - beta) * student_TK.exp()
    return beta * q_TK.xlogy(q_TK / m_TK).sum(dim=1)
