"""What a method asks of the other stations, derived from its terms."""

from dataclasses import dataclass

from megatron_opd.config.schema import CrossEntropyTerm, LinearDecay, MethodConfig, PolicyGradientTerm, Weight


@dataclass(frozen=True)
class Plan:
    rollouts: bool  # the student samples (otherwise the data set's traces are the text)
    rewards: bool
    teacher: bool


def plan(method: MethodConfig) -> Plan:
    """The signals the terms of `method` read."""
    terms = method.terms.values()
    traces = any(isinstance(t, CrossEntropyTerm) and t.targets == "trace" for t in terms)
    return Plan(
        rollouts=not traces,
        rewards=any(isinstance(t, PolicyGradientTerm) for t in terms),
        teacher=any(isinstance(t, CrossEntropyTerm) and t.targets == "teacher_argmax" for t in terms),
    )


def weight_at(weight: Weight, step: int) -> float:
    """The weight of a term at `step` (counted from 0)."""
    if isinstance(weight, LinearDecay):
        return max(weight.start - weight.decay * step, weight.floor)
    return weight
