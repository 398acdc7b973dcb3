"""Weights of tokens to which the sampler and the trainer give different probabilities. No torch."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, assert_never

from megatron_opd.contracts.ranges import NonNegativeFloat, PositiveFloat
from megatron_opd.errors import ConfigError
from megatron_opd.methods.part import Around, CorrectionPart, Needs

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_opd.methods.tokens import Tokens


@dataclass(frozen=True)
class Correction(CorrectionPart):
    """For sampler and trainer disagreeing on w = p_trainer(token) / p_sampler(token), both at the
    step's first weights.

    truncated: min(w, high). masked: w within [low, high], else 0 (IcePop). sequence_*: the same
    with the product of w over the sequence. geometric: w, but 0 for sequences whose geometric mean
    of w is outside.
    """

    # what becomes of w, as above
    kind: Literal["truncated", "masked", "sequence_truncated", "sequence_masked", "geometric"]
    high: PositiveFloat  # the largest w that is kept, or what it is cut to
    low: NonNegativeFloat = 0.0  # the smallest w that is kept; not with the truncated kinds

    formula = "a function of `w = e^(O - B)` of the token, or of its whole response"

    def needs(self) -> Needs:
        return Needs(sampler=True, student_pass=True)

    def check(self, key: str, around: Around) -> list[str]:
        """The window must not be empty, and must hold 1: the ratio of a sampler that agrees with
        the trainer."""
        if self.kind in ("truncated", "sequence_truncated"):
            if self.low:
                raise ConfigError(f"{key}.low: no effect with kind={self.kind}; remove it")
        elif self.low >= self.high:
            raise ConfigError(
                f"{key}.low: {self.low} is not below high={self.high}, so no token is kept"
            )
        elif not self.low <= 1 <= self.high:
            raise ConfigError(
                f"{key}: keeps ratios from {self.low} to {self.high}, and none of a sampler that "
                "agrees with the trainer; let 1 lie between low and high"
            )
        return []

    def value(self, tokens: "Tokens") -> "Tensor":
        log_w_T = tokens.logprob("old") - tokens.logprob("rollout")
        log_w_T = log_w_T.masked_fill(~tokens.drawn_T, 0.0)
        w_T = log_w_T.exp()
        match self.kind:
            case "truncated":
                return w_T.clamp(max=self.high)
            case "masked":
                return w_T * self._keeps(w_T)
            case "sequence_truncated":
                return tokens.over_rows(log_w_T).exp().clamp(max=self.high)
            case "sequence_masked":
                product_T = tokens.over_rows(log_w_T).exp()
                return product_T * self._keeps(product_T)
            case "geometric":
                return w_T * self._keeps(tokens.mean_over_rows(log_w_T).exp())
            case _:
                assert_never(self.kind)

    def _keeps(self, ratios_T: "Tensor") -> "Tensor":
        return (ratios_T >= self.low) & (ratios_T <= self.high)
