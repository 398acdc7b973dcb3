"""What a section of the GPU check yields: one line of its table."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Outcome = Literal["passed", "FAILED", "measured", "skipped"]


@dataclass(frozen=True)
class Row:
    """`limit` is what the value must keep, or, of a measurement, what it is seen against."""

    what: str
    value: float | int | bool | str
    limit: str
    outcome: Outcome

    @property
    def shown(self) -> str:
        return f"{self.value:.4g}" if isinstance(self.value, float) else str(self.value)


def below(what: str, value: float, limit: float) -> Row:
    return Row(
        what,
        value,
        f"< {limit:g}",
        "passed" if math.isfinite(value) and value < limit else "FAILED",
    )


def within(what: str, value: float, low: float, high: float) -> Row:
    return Row(what, value, f"{low:g} .. {high:g}", "passed" if low <= value <= high else "FAILED")


def exactly(what: str, value: int | bool, wanted: int | bool) -> Row:
    return Row(what, value, str(wanted), "passed" if value == wanted else "FAILED")


def measured(what: str, value: float | int, beside: str = "") -> Row:
    return Row(what, value, beside, "measured")


def skipped(what: str, reason: str) -> Row:
    return Row(what, "", reason, "skipped")


def failed(what: str, error: BaseException) -> Row:
    return Row(
        what, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", "runs", "FAILED"
    )


def deviation(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted, in float64; infinite where they are
    not finite alike."""
    got, want = (x.detach().double().cpu() for x in (got, want))
    finite = want.isfinite()
    if not torch.equal(got.isfinite(), finite):
        return math.inf
    return float((got[finite] - want[finite]).norm() / want[finite].norm().clamp(min=1e-300))
