"""An episode while it is played: its turns so far, and what it becomes."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from megatron_opd.contracts.environments import Exchange, Observation
from megatron_opd.contracts.rows import Episode, Verdict
from megatron_opd.contracts.sampling import Completion
from megatron_opd.contracts.skills import Skill
from megatron_opd.recipe.agents import EnvironmentConfig

End = Literal["stop", "length", "turns", "budget", "failed"]


@dataclass(frozen=True)
class Turn:
    """One completion of the model, and the tokens that it continued."""

    prompt_ids: np.ndarray  # int32
    privileged_ids: np.ndarray | None  # int32, the prompt with a text that the student did not read
    completion: Completion
    text: str  # without special tokens and without the end
    between_ids: np.ndarray  # int32, the environment's words ahead of it, in a growing episode
    action_T: np.ndarray  # bool, of the completion's tokens that hold the action


@dataclass
class OpenEpisode:
    """An attempt at a task, in a slot of the environments."""

    episode: Episode
    slot: int
    observation: Observation | None = None  # None while the environment has not answered
    skill: Skill | None = None
    turns: list[Turn] = field(default_factory=list)
    exchanges: list[Exchange] = field(default_factory=list)
    ended: End | None = None

    @property
    def waits(self) -> bool:
        """True while the environment owes an answer."""
        return self.observation is None and self.ended is None

    @property
    def num_sampled(self) -> int:
        return sum(len(turn.completion.token_ids) for turn in self.turns)

    def hear(self, observation: Observation, settings: EnvironmentConfig, max_tokens: int) -> None:
        """Takes the environment's answer, which may end the episode."""
        if self.turns:
            last = self.exchanges[-1]
            valid = last.valid and observation.valid
            self.exchanges[-1] = replace(last, valid=valid, reward=observation.reward)
        self.observation = observation
        if observation.failed:
            self.ended = "failed"
        elif observation.terminated:
            self.ended = "stop"
        elif observation.truncated or len(self.turns) >= settings.max_turns:
            self.ended = "turns"
        elif self.num_sampled >= max_tokens:
            self.ended = "budget"

    def finished(self, settings: EnvironmentConfig) -> Episode:
        """The episode with its verdict and reward."""
        observation = self.observation
        assert observation is not None and self.ended is not None
        if observation.failed:
            verdict = Verdict(0.0, None, observation.failed)
        else:
            verdict = Verdict(
                _score(observation), observation.won, "won" if observation.won else "lost"
            )
        return replace(
            self.episode,
            verdict=verdict,
            reward=_reward(observation, self.exchanges, settings),
            turns=max(len(self.turns), 1),
            ended=self.ended,
            task_type=self.episode.task_type,
            skill=self.skill.name if self.skill else "",
        )


def _score(observation: Observation) -> float:
    """1 for a task that is won, where the environment gives no score."""
    return max(observation.score, float(observation.won))


def _reward(
    observation: Observation, exchanges: Sequence[Exchange], settings: EnvironmentConfig
) -> float:
    match settings.reward:
        case "won":
            worth = float(observation.won)
        case "score":
            worth = _score(observation)
        case "return":
            worth = sum(exchange.reward for exchange in exchanges)
    return settings.reward_scale * worth
