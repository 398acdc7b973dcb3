"""The terms of a method, and the method. No torch.

A loss is a weighted sum of terms. Terms of five kinds share one forward pass of the student; what
makes the methods of the literature different are the advantages, ratios, gates, corrections and
weights in a term. Those have a file per kind in this folder.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Gt, Le

from megatron_opd.contracts.ranges import Fraction, NonNegativeInt, PositiveInt, ProperFraction
from megatron_opd.methods.advantages import Advantage, RewardAdvantage
from megatron_opd.methods.corrections import Correction
from megatron_opd.methods.gates import Gate
from megatron_opd.methods.ratios import ClippedRatio, Ratio
from megatron_opd.methods.schedules import Weight

# How a term's tokens are averaged. "-norm" divides by rollout.max_completion_tokens in the place of
# the length.
Aggregate = Literal[
    "token-mean",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "token-sum",
]

# What a term is averaged over: its own tokens | the sum of its gates | every token of the
# responses, given ones too.
Denominator = Literal["tokens", "gated", "all"]


# -------------------------------------------------------------------------------------------- terms
@dataclass(frozen=True)
class PolicyGradientTerm:
    """-ratio * advantage of the sampled token. A default one is GRPO's."""

    kind: Literal["policy_gradient"]
    weight: Weight = 1.0
    advantages: dict[str, Advantage] = field(
        default_factory=lambda: {"reward": RewardAdvantage("reward")}
    )
    # the sum of the advantages gets mean 0 and deviation 1 over the update's tokens
    whiten: bool = False
    ratio: Ratio = field(default_factory=lambda: ClippedRatio("old"))
    gates: dict[str, Gate] = field(default_factory=dict)
    correction: Correction | None = None
    aggregate: Aggregate = "token-mean"
    denominator: Denominator = "tokens"


@dataclass(frozen=True)
class CrossEntropyTerm:
    """-log p_student(target): the teacher's argmax token on the student's prefix, or the next token
    of a trace."""

    kind: Literal["cross_entropy"]
    targets: Literal["teacher_argmax", "trace"]
    weight: Weight = 1.0
    gates: dict[str, Gate] = field(default_factory=dict)
    correction: Correction | None = None
    aggregate: Aggregate = "token-mean"
    denominator: Denominator = "tokens"


@dataclass(frozen=True)
class TopKTerm:
    """A divergence on the teacher's k best ids, differentiated through the student's
    log-probabilities of them.

    jsd_teacher_side: beta sum q (log q - log m), m = beta q + (1 - beta) p: the first half of
    TrOPD's JSD.
    """

    kind: Literal["topk"]
    k: PositiveInt
    weight: Weight = 1.0
    divergence: Literal["forward_kl", "jsd_teacher_side"] = "forward_kl"
    # of forward_kl: the rest of the vocabulary
    tail: Literal["none", "renormalise", "ghost", "generalised"] = "none"
    beta: Annotated[float, Gt(0), Le(1)] | None = None  # of jsd_teacher_side
    divide_by_k: bool = False
    gates: dict[str, Gate] = field(default_factory=dict)
    correction: Correction | None = None
    aggregate: Aggregate = "token-mean"
    denominator: Denominator = "tokens"


@dataclass(frozen=True)
class DivergenceTerm:
    """A divergence over the whole vocabulary. No pipeline stages; the teacher's TP size is 1 or the
    student's."""

    kind: Literal["divergence"]
    divergence: Literal[
        "forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd", "alpha_beta"
    ]  # fmt: skip
    weight: Weight = 1.0
    alpha: float | None = None
    beta: float | None = None
    gates: dict[str, Gate] = field(default_factory=dict)
    aggregate: Aggregate = "token-mean"
    denominator: Denominator = "tokens"


@dataclass(frozen=True)
class EntropyTerm:
    """Minus the student's entropy: a bonus for staying undecided."""

    kind: Literal["entropy"]
    weight: Weight = 1e-3
    aggregate: Aggregate = "token-mean"


Term = PolicyGradientTerm | CrossEntropyTerm | TopKTerm | DivergenceTerm | EntropyTerm


# --------------------------------------------------------------------------------------- the method
@dataclass(frozen=True)
class PrefixConfig:
    """Responses that begin with the first tokens of the prompt's trace, TrOPD's off-policy
    guidance.

    At step k at most L(k) = max_completion_tokens (1 + cos(pi k / steps)) / 2 tokens, none from
    step `steps` on.
    """

    steps: PositiveInt
    # of the length: uniform on 0..L(k) | L(k), where the trace has as many
    law: Literal["uniform", "full"] = "uniform"


@dataclass(frozen=True)
class MethodConfig:
    """A name for the logs, the terms of the loss, and what the student's samples are mixed with."""

    name: str
    terms: dict[str, Term]
    traces_per_group: NonNegativeInt = 0  # traces that join the samples of each prompt (LUFFY)
    prefix: PrefixConfig | None = None
    # of the steps; the others are on traces in the place of samples (GKD's lambda)
    on_policy_fraction: Fraction = 1.0
    teacher_share: ProperFraction = 0.0  # of the tokens, drawn from the teacher (MiniLLM's alpha)
    # times a step samples further prompts for groups of equal rewards (DAPO)
    max_refills: NonNegativeInt = 0
