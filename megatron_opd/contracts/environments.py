"""Environments: what a worker's process plays, and what a sampler sees of it. No torch.

An environment keeps gymnasium's contract (gymnasium.farama.org/api/env): text in, text out. It need
not inherit from `gymnasium.Env`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

Info = dict[str, object]


class TextEnvironment(Protocol):
    """An environment, as its author writes it. Runs in a worker's process, one call at a time.

    `info` may have the keys task (what is to be done, in words), task_type (the kind of task, by
    which results are listed), admissible (a list of the actions that are understood now), won (true
    once the task is done), score (from 0 to 1), valid (false for an action that was not
    understood). Beside these methods it may have `task_ids(split) -> list[str]` and `close()`.
    """

    def reset(self, *, seed: int, options: dict[str, str]) -> tuple[str, Info]:
        """Begins the task `options["task_id"]`; everything it draws follows from `seed`."""

    def step(self, action: str) -> tuple[str, float, bool, bool, Info]:
        """Returns observation, reward, terminated, truncated, info."""


@dataclass(frozen=True)
class Observation:
    """An environment's answer to a reset or to an action."""

    text: str
    reward: float = 0.0  # of this step
    terminated: bool = False  # by the task: it is won or lost
    truncated: bool = False  # by the environment's own limit
    task: str = ""  # in every answer, also where the environment named it at the reset alone
    task_type: str = ""
    admissible: tuple[str, ...] | None = None
    won: bool = False
    score: float = 0.0  # so far, from 0 to 1
    valid: bool = True
    failed: str = ""  # why the environment is broken; "" where it is not

    @property
    def ended(self) -> bool:
        return self.terminated or self.truncated or bool(self.failed)


class Environments(Protocol):
    """The environments of this process, one of each slot, which answer in any order.

    A slot has at most one call open. A call that hangs, raises or ends its process is an
    Observation with `failed`; the slot can be reset again.
    """

    def reset(self, slot: int, task_id: str, seed: int) -> None:
        """Begins a task in a slot. The answer comes through `ready`."""

    def step(self, slot: int, action: str) -> None:
        """Sends an action. The answer comes through `ready`."""

    def ready(self, timeout: float) -> list[tuple[int, Observation]]:
        """The answers that have arrived, with their slots: at least one after at most `timeout`
        seconds, or none."""

    def task_ids(self, split: str) -> list[str]:
        """The tasks of a split. Raises RunError where the environment names none."""

    def close(self) -> None:
        """Ends all processes."""


@dataclass(frozen=True)
class Exchange:
    """One turn of an episode: what was seen, what the model did, what the environment paid."""

    observation: Observation
    action: str
    valid: bool  # false: the model's text held no such action, or the environment knew none
    reward: float = 0.0


@dataclass(frozen=True)
class Action:
    """An action taken from a completion's text."""

    text: str
    valid: bool = True


class Dialogue(Protocol):
    """The words between a model and an environment: observations to prompts, completions to
    actions. Two calls with equal arguments give equal texts."""

    def prompt(self, past: Sequence[Exchange], observation: Observation) -> str:
        """The user's message of a turn: the task, the last exchanges, what is seen now, and how to
        answer. `past` has every exchange of the episode; the dialogue shortens it."""

    def reply(self, observation: Observation) -> str:
        """What a growing conversation appends for an observation behind the model's words."""

    def action(self, text: str) -> Action:
        """The action in a completion."""

    def end_of_action(self, text: str) -> int | None:
        """The number of characters behind which the environment takes over; None: at the end."""
