"""Advantages from the verifier's reward of a response. No torch."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megatron_opd.contracts.ranges import Fraction, NonNegativeFloat, PositiveFloat
from megatron_opd.errors import ConfigError
from megatron_opd.methods.groups import group_advantages, overlong_penalty
from megatron_opd.methods.part import AdvantagePart, Around, Needs
from megatron_opd.methods.schedules import Weight

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_opd.methods.tokens import Tokens

NO_GROUP = "rollout.samples_per_prompt: 1 gives {} no group to compare; set 2 or more"


@dataclass(frozen=True)
class RewardAdvantage(AdvantagePart):
    """The verifier's reward of the sequence against those of its group, the same for each of its
    tokens."""

    kind: Literal["reward"]
    weight: Weight = 1.0
    # divide by the group's deviation | only centre | the reward itself | minus the mean of the
    # others
    normalise: Literal["std", "mean", "none", "leave_one_out"] = "std"
    std_eps: PositiveFloat = 1e-6  # added to the deviation that is divided by
    # over this last part of max_completion_tokens up to 1 is taken from the reward: DAPO's soft
    # overlong punishment
    overlong: Fraction = 0.0
    # what the group's mean and deviation are of, where an attempt has several rows: the attempts,
    # each with the mean of its rows | all rows, so that an attempt of more turns weighs more
    over: Literal["episodes", "rows"] = "episodes"

    formula = "`A`: r of the response, centred, over the deviation, leave-one-out, or as it is"

    def needs(self) -> Needs:
        return Needs(rewards=True)

    def check(self, key: str, around: Around) -> list[str]:
        if self.normalise != "none" and around.group_size == 1:
            raise ConfigError(NO_GROUP.format(key.rpartition(".advantages")[0]))
        return super().check(key, around)

    def value(self, tokens: "Tokens") -> "Tensor":
        rewards_N = tokens.rewards_N + overlong_penalty(
            tokens.lengths_N, tokens.max_completion_tokens, self.overlong
        )
        relative_N = group_advantages(
            rewards_N,
            tokens.groups_N,
            self.normalise,
            self.std_eps,
            tokens.episodes_N if self.over == "episodes" else None,
        )
        return tokens.spread(relative_N)


@dataclass(frozen=True)
class ProcessRewardAdvantage(AdvantagePart):
    """beta (log p_process(token) - log p_reference(token)) of this token and those after it:
    PRIME's implicit rewards.

    The process model begins as the student and is trained beside it, to tell right responses from
    wrong ones: cross-entropy of sigmoid(the response's sum of rewards) with the verifier's reward.
    Each reward is taken relative to the mean of those in the other responses of the group.
    """

    kind: Literal["process_reward"]
    weight: Weight = 1.0
    beta: PositiveFloat = 0.05  # the factor of the log-ratio
    # of the process model; the rest of its optimizer is as train.optimizer
    lr: PositiveFloat = 1e-6
    # of the process model's gradient: the largest global norm; 0 does not clip
    clip_grad: NonNegativeFloat = 10.0

    formula = "the sum to the end of `beta (P - R)`, minus its mean in the group's other responses"

    def needs(self) -> Needs:
        return Needs(rewards=True, reference=True, process=True)

    def check(self, key: str, around: Around) -> list[str]:
        if around.group_size == 1:
            raise ConfigError(NO_GROUP.format(key.rpartition(".advantages")[0]))
        return super().check(key, around)

    def value(self, tokens: "Tokens") -> "Tensor":
        """PRIME, arXiv 2502.01456, Eq. 5."""
        sampled_T = tokens.sampled_T.double()
        reward_T = tokens.logprob("process") - tokens.logprob("reference")
        reward_T = self.beta * reward_T * sampled_T
        mean_N = tokens.mean_of_rows(reward_T)
        # r - mean of the others' = (r minus its own mean) + (its own mean minus the mean of the
        # others')
        relative_N = group_advantages(mean_N, tokens.groups_N, "leave_one_out", eps=1.0)
        baseline_T = tokens.spread(mean_N - relative_N)
        return tokens.to_go((reward_T - baseline_T) * sampled_T, 1.0, mean=False)
