"""Which tokens a term counts, and how much: one number in [0, 1] per token.

Gates are computed once per update's batch, on the host, from the student as it was before the first
update of the step: they stay the same in every micro-batch, on every layout, and while the policy
moves.
"""

import math
from collections.abc import Mapping
from typing import assert_never

import torch
from torch import Tensor

from megatron_opd.methods.corrections import Correction
from megatron_opd.methods.gates import (
    EndGate,
    EntropyGate,
    EntropyQuantileGate,
    FinishedGate,
    Gate,
    LogRatioGate,
    ProbabilityGapGate,
    SigmoidGate,
    TrustGate,
    WrongGate,
)
from megatron_opd.objective.advantages import log_ratio
from megatron_opd.objective.batch import Batch


def gates(chosen: Mapping[str, Gate], batch: Batch) -> Tensor:
    """The product of the gates, float64 [T]."""
    product_T = torch.ones(batch.num_tokens, dtype=torch.float64)
    for gate in chosen.values():
        value_T = _value(gate, batch).double()
        product_T = product_T * (1 - value_T if gate.invert else value_T)
    return product_T


def _value(gate: Gate, batch: Batch) -> Tensor:
    match gate:
        case EntropyQuantileGate():
            return _highest(batch.student_entropy_T, batch.sampled_T, gate.top)
        case EntropyGate():
            return (
                batch.student_entropy_T if gate.model == "student" else batch.teacher_entropy_T
            ) > gate.above
        case LogRatioGate():
            return _delta(batch) >= gate.at_least
        case ProbabilityGapGate():
            return batch.teacher_T.exp() - batch.old_T.exp() <= gate.at_most
        case TrustGate():
            trust_T = _delta(batch).exp().clamp(max=1.0)
            return trust_T if gate.expected else batch.uniform_T < trust_T
        case SigmoidGate():
            signal_T = _delta(batch) if gate.signal == "log_ratio" else batch.student_entropy_T
            return (gate.beta * signal_T).sigmoid()
        case WrongGate():
            return batch.wrong_T(gate.scope)
        case EndGate():
            return ~batch.end_T
        case FinishedGate():
            return batch.finished_T
        case _:
            assert_never(gate)


def _delta(batch: Batch) -> Tensor:
    return log_ratio(batch.teacher_T, batch.old_T)


def _highest(values_T: Tensor, among_T: Tensor, top: float) -> Tensor:
    """The ceil(top * n) largest values among the n tokens that count, and those equal to the
    smallest of them."""
    candidates = values_T[among_T]
    if not len(candidates):
        return torch.zeros_like(among_T)
    threshold = candidates.topk(math.ceil(top * len(candidates))).values[-1]
    return among_T & (values_T >= threshold)


def correction(chosen: Correction | None, batch: Batch) -> Tensor:
    """What multiplies a sampled token's loss because the sampler was not quite the trainer, float64
    [T]."""
    if chosen is None:
        return torch.ones(batch.num_tokens, dtype=torch.float64)
    log_w_T = (batch.old_T - batch.rollout_T).masked_fill(~batch.drawn_T, 0.0)
    w_T, sum_T = log_w_T.exp(), batch.over_sequences(log_w_T)
    match chosen.kind:
        case "truncated":
            return w_T.clamp(max=chosen.high)
        case "masked":
            return w_T * _within(w_T, chosen)
        case "sequence_truncated":
            return sum_T.exp().clamp(max=chosen.high)
        case "sequence_masked":
            return sum_T.exp() * _within(sum_T.exp(), chosen)
        case "geometric":
            mean_T = (sum_T / batch.over_sequences(batch.sampled_T.double()).clamp(min=1)).exp()
            return w_T * _within(mean_T, chosen)
        case _:
            assert_never(chosen.kind)


def _within(values_T: Tensor, window: Correction) -> Tensor:
    return (values_T >= window.low) & (values_T <= window.high)
