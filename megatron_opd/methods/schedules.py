"""Weights over the steps of a run; a plain number is the same at every step. No torch."""

from dataclasses import dataclass
from typing import Literal

from megatron_opd.contracts.ranges import NonNegativeFloat, PositiveInt


@dataclass(frozen=True)
class LinearDecay:
    """w(step) = max(start - decay * step, floor); steps count from 0."""

    start: NonNegativeFloat
    decay: NonNegativeFloat
    floor: NonNegativeFloat = 0.0
    kind: Literal["linear"] = "linear"


@dataclass(frozen=True)
class CosineDecay:
    """w(step) = end + (start - end) (1 + cos(pi step / steps)) / 2, and `end` from step `steps`
    on."""

    kind: Literal["cosine"]
    start: NonNegativeFloat
    steps: PositiveInt
    end: NonNegativeFloat = 0.0


@dataclass(frozen=True)
class Switch:
    """w(step) = before while step < at, then after."""

    kind: Literal["switch"]
    before: NonNegativeFloat
    at: PositiveInt
    after: NonNegativeFloat


Weight = NonNegativeFloat | LinearDecay | CosineDecay | Switch
