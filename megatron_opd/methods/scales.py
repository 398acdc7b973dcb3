"""Gates that are scales: how much a token counts by where it stands, more than 1 too. No torch."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megatron_opd.contracts.ranges import NonNegativeFloat, PositiveFloat
from megatron_opd.errors import ConfigError
from megatron_opd.methods.part import Around, GatePart, Needs
from megatron_opd.methods.schedules import Schedule, Weight, weight_at

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_opd.methods.tokens import Tokens


@dataclass(frozen=True)
class DriftGate(GatePart):
    """More for early tokens, less once the row has left the teacher: from 1 + gamma in front down
    to 1 at the end, by the share of the row's |log-ratio| that lies behind it. IW-OPD."""

    kind: Literal["drift"]
    gamma: NonNegativeFloat = 0.5  # what the first token counts beyond 1

    formula = "`1 + gamma (1 - sum of abs(T - B) before the token / that of the row)`"

    def needs(self) -> Needs:
        return Needs(teacher=True, sampler=True)

    def teaches(self) -> bool:
        return True

    def value(self, tokens: "Tokens") -> "Tensor":
        distance_T = tokens.log_ratio("teacher", "rollout").abs() * tokens.sampled_T
        whole_T = tokens.over_rows(distance_T).clamp(min=1e-8)
        return 1 + self.gamma * (1 - tokens.before(distance_T) / whole_T)


@dataclass(frozen=True)
class TurnBalanceGate(GatePart):
    """Every turn counts the same, however many tokens it has; `by_token` of the weight stays with
    the tokens, and may fall over the steps. TurnOPD's loss budget."""

    kind: Literal["turn_balance"]
    by_token: Weight = 0.0  # 0: every turn counts the same; 1: every token

    formula = "`w + (1 - w) m / n`, n the sampled tokens of the token's turn, m the mean n of turns"

    def check(self, key: str, around: Around) -> list[str]:
        if weight_at(self.by_token, 0) >= 1 and weight_at(self.by_token, around.num_steps) >= 1:
            raise ConfigError(f"{key}.by_token: 1 or more leaves every turn as it is; lower it")
        if isinstance(self.by_token, Schedule):
            return self.by_token.check(f"{key}.by_token", around.num_steps)
        return []

    def value(self, tokens: "Tokens") -> "Tensor":
        turns_T = tokens.turns_T
        sampled_T = tokens.sampled_T.double()
        count = int(turns_T.max()) + 1 if len(turns_T) else 0
        tokens_of = sampled_T.new_zeros(count).index_add(0, turns_T, sampled_T)
        mean = sampled_T.sum() / (tokens_of > 0).sum().clamp(min=1)
        kept = weight_at(self.by_token, tokens.step)
        return kept + (1 - kept) * mean / tokens_of[turns_T].clamp(min=1)


@dataclass(frozen=True)
class SourceSpreadGate(GatePart):
    """The teacher's log-ratios of every source of tasks get the spread of all of them together, so
    that a loud one does not drown the others. DN-MOPD."""

    kind: Literal["source_spread"]
    low: PositiveFloat = 0.25  # the least factor of a source
    high: PositiveFloat = 4.0  # the largest factor of a source

    formula = "`clip(std of T - B over the update / that over the source, low, high)`"

    def needs(self) -> Needs:
        return Needs(teacher=True, sampler=True, data_sources=True)

    def check(self, key: str, around: Around) -> list[str]:
        if self.low >= self.high:
            raise ConfigError(f"{key}.low: {self.low} is not below high={self.high}")
        return []

    def value(self, tokens: "Tokens") -> "Tensor":
        delta_T = tokens.log_ratio("teacher", "rollout")
        whole = delta_T[tokens.sampled_T].std(correction=0)
        scale_T = tokens.zeros_T + 1
        names_N = tokens.data_sources_N
        for name in set(names_N.tolist()):
            members_T = tokens.spread(names_N == name) & tokens.sampled_T
            spread = delta_T[members_T].std(correction=0)
            if int(members_T.sum()) > 1 and spread > 0 and whole > 0:
                scale_T[members_T] = (whole / spread).clamp(self.low, self.high)
        return scale_T
