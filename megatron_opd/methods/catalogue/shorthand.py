"""Terms and advantages that several entries of the catalogue share."""

from typing import Literal

from megatron_opd.methods.advantages import Advantage, LogRatioAdvantage, RewardAdvantage
from megatron_opd.methods.gates import Gate
from megatron_opd.methods.part import Aggregate, Denominator
from megatron_opd.methods.ratios import ClippedRatio, NoRatio, Ratio
from megatron_opd.methods.schedules import Weight
from megatron_opd.methods.terms import CrossEntropyTerm, PolicyGradientTerm

SEQUENCES: Aggregate = "seq-mean-token-mean"
UNCLIPPED = ClippedRatio("old", clip_low=None, clip_high=None)
NO_RATIO = NoRatio("none")
GRPO = PolicyGradientTerm("policy_gradient")
TRACE = CrossEntropyTerm("cross_entropy", targets="trace")


def reward(
    normalise: Literal["std", "mean", "none", "leave_one_out"] = "std",
) -> dict[str, Advantage]:
    """The verifier's rewards as the only advantage."""
    return {"reward": RewardAdvantage("reward", normalise=normalise)}


def teacher(
    *,
    transform: Literal["identity", "floor", "mixture"] = "identity",
    mix: float | None = None,
    anchor: Literal["current", "old", "rollout"] = "current",
    discount: float = 0.0,
    mean_to_go: bool = False,
) -> dict[str, Advantage]:
    """The teacher's log-ratio to the student as the only advantage."""
    log_ratio = LogRatioAdvantage(
        "log_ratio",
        transform=transform,
        mix=mix,
        anchor=anchor,
        discount=discount,
        mean_to_go=mean_to_go,
    )
    return {"teacher": log_ratio}


def distil(
    weight: Weight = 1.0,
    *,
    advantages: dict[str, Advantage] | None = None,
    whiten: bool = False,
    ratio: Ratio = UNCLIPPED,
    gates: dict[str, Gate] | None = None,
    aggregate: Aggregate = "token-mean",
    denominator: Denominator = "tokens",
) -> PolicyGradientTerm:
    """The reverse KL on the student's samples: -rho sg[log q - log p]."""
    return PolicyGradientTerm(
        "policy_gradient",
        weight=weight,
        advantages=advantages or teacher(),
        whiten=whiten,
        ratio=ratio,
        gates=gates or {},
        aggregate=aggregate,
        denominator=denominator,
    )


def reference_kl(weight: float, k3_limit: float | None = None) -> PolicyGradientTerm:
    """weight * k3 of KL(student || reference), whose gradient is that of -sg[e^D - 1] log p.

    Above `k3_limit` k3 is cut off, and has no gradient.
    """
    log_ratio = LogRatioAdvantage(
        "log_ratio", model="reference", transform="expm1", k3_limit=k3_limit
    )
    return PolicyGradientTerm(
        "policy_gradient",
        weight=weight,
        advantages={"reference": log_ratio},
        ratio=NO_RATIO,
    )
