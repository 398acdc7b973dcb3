"""The advantages of a policy-gradient term: -ratio * advantage of a sampled token. No torch.

A term sums its advantages, then applies its factors; none has a gradient. Every class here is a
mapping in a recipe; its `kind` says which.
"""

from megatron_opd.methods.advantages.rewards import ProcessRewardAdvantage, RewardAdvantage
from megatron_opd.methods.advantages.student import ConstantAdvantage, EntropyAdvantage
from megatron_opd.methods.advantages.teacher import (
    LogRatioAdvantage,
    LogRatioFactor,
    ProximalReturnAdvantage,
    ShapingAdvantage,
    StateAdvantage,
    TopKAdvantage,
)

Advantage = (
    RewardAdvantage
    | LogRatioAdvantage
    | ShapingAdvantage
    | TopKAdvantage
    | ProcessRewardAdvantage
    | LogRatioFactor
    | ConstantAdvantage
    | EntropyAdvantage
    | StateAdvantage
    | ProximalReturnAdvantage
)
