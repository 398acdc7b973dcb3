"""Advantages that ask nobody but the student. No torch."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megatron_opd.methods.part import AdvantagePart, Needs
from megatron_opd.methods.schedules import SignedWeight

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_opd.methods.tokens import Tokens


@dataclass(frozen=True)
class ConstantAdvantage(AdvantagePart):
    """The same for every token: below 0 it takes probability from what was sampled. OPSA."""

    kind: Literal["constant"]
    weight: SignedWeight = 1.0

    formula = "`1`: its weight, which may be negative, is the advantage"
    of_state = True

    def value(self, tokens: "Tokens") -> "Tensor":
        return tokens.sampled_T.double()


@dataclass(frozen=True)
class EntropyAdvantage(AdvantagePart):
    """The student's entropy where the token was drawn, from 0 at the update's lowest to 1 at its
    highest: OPSA's scale."""

    kind: Literal["entropy"]
    weight: SignedWeight = 1.0

    formula = "`(H_S - min H_S) / (max H_S - min H_S)` over the update's tokens"
    of_state = True

    def needs(self) -> Needs:
        return Needs(student_pass=True)

    def value(self, tokens: "Tokens") -> "Tensor":
        entropy_T = tokens.entropy("student")
        counted = entropy_T[tokens.sampled_T]
        if not len(counted):
            return entropy_T
        spread = (counted.max() - counted.min()).clamp(min=1e-12)
        return (entropy_T - counted.min()) / spread
