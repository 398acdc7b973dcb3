"""Weights of tokens to which the sampler and the trainer give different probabilities. No torch."""

from dataclasses import dataclass
from typing import Literal

from megatron_opd.contracts.ranges import NonNegativeFloat, PositiveFloat


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
