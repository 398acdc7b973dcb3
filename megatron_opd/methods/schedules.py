"""Weights over the steps of a run; a plain number is the same at every step. No torch."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from megatron_opd.contracts.ranges import NonNegativeFloat, PositiveInt
from megatron_opd.errors import ConfigError


class Schedule(ABC):
    """A weight that depends on the step, counted from 0."""

    @abstractmethod
    def value(self, step: int) -> float: ...

    @abstractmethod
    def check(self, key: str, num_steps: int) -> list[str]:
        """Warnings of keys without effect. Raises ConfigError where it never changes."""

    @abstractmethod
    def words(self) -> str:
        """The weight in a few words, for a table."""


@dataclass(frozen=True)
class LinearDecay(Schedule):
    """w(step) = max(start - decay * step, floor); steps count from 0."""

    start: NonNegativeFloat  # at step 0
    decay: NonNegativeFloat  # taken off per step
    floor: NonNegativeFloat = 0.0  # the least
    kind: Literal["linear"] = "linear"  # need not be written

    def value(self, step: int) -> float:
        return max(self.start - self.decay * step, self.floor)

    def check(self, key: str, num_steps: int) -> list[str]:
        if self.decay == 0:
            raise ConfigError(f"{key}.decay: 0 never decays; write {key}={self.start}")
        if self.floor >= self.start:
            raise ConfigError(
                f"{key}.floor: {self.floor} is not below start={self.start}; write one number"
            )
        if self.start - self.decay <= self.floor and num_steps > 1:
            return [f"{key}.decay: the weight is at its floor from step 1 on"]
        return []

    def words(self) -> str:
        return f"max({self.start:g} - {self.decay:g} * step, {self.floor:g})"


@dataclass(frozen=True)
class CosineDecay(Schedule):
    """w(step) = end + (start - end) (1 + cos(pi step / steps)) / 2, and `end` from step `steps`
    on."""

    kind: Literal["cosine"]
    start: NonNegativeFloat  # at step 0
    steps: PositiveInt  # the step at which it reaches its end
    end: NonNegativeFloat = 0.0  # from there on

    def value(self, step: int) -> float:
        return self.end + (self.start - self.end) * cosine(step, self.steps)

    def check(self, key: str, num_steps: int) -> list[str]:
        if self.end >= self.start:
            raise ConfigError(
                f"{key}.end: {self.end} is not below start={self.start}; write one number"
            )
        return []

    def words(self) -> str:
        return f"cosine from {self.start:g} to {self.end:g} in {self.steps} steps"


@dataclass(frozen=True)
class Switch(Schedule):
    """w(step) = before while step < at, then after."""

    kind: Literal["switch"]
    before: NonNegativeFloat  # until the step
    at: PositiveInt  # the first step of the second weight
    after: NonNegativeFloat  # from the step on

    def value(self, step: int) -> float:
        return self.before if step < self.at else self.after

    def check(self, key: str, num_steps: int) -> list[str]:
        if self.before == self.after:
            raise ConfigError(f"{key}.after: equals before={self.before}; write one number")
        if self.at >= num_steps:
            return [f"{key}.at: {self.at} is never reached within num_steps={num_steps}"]
        return []

    def words(self) -> str:
        return f"{self.before:g}, from step {self.at} {self.after:g}"


Weight = NonNegativeFloat | LinearDecay | CosineDecay | Switch
SignedWeight = float | LinearDecay | CosineDecay | Switch


def weight_at(weight: SignedWeight, step: int) -> float:
    """The weight at `step`, counted from 0."""
    return weight.value(step) if isinstance(weight, Schedule) else weight


def check_weight(key: str, weight: SignedWeight, num_steps: int) -> list[str]:
    """Warnings of a weight without effect. Raises ConfigError where a schedule never changes."""
    if isinstance(weight, Schedule):
        return weight.check(key, num_steps)
    return [] if weight else [f"{key}: 0, so the term is computed without effect"]


def cosine(step: int, steps: int) -> float:
    """From 1 at step 0 to 0 at `steps` and later."""
    return 0.5 * (1 + math.cos(math.pi * min(step, steps) / steps))
