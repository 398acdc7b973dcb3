"""A dialogue that reads actions, and remembers turns, as verl-agent's and SDAR's code does."""

from collections.abc import Callable, Sequence
from typing import ClassVar

from megatron_opd.contracts.environments import Action, Exchange, Observation
from megatron_opd.environments.tags import released_action, thought_and_action
from megatron_opd.recipe.agents import EnvironmentConfig


class ReleasedDialogue:
    """The half of a dialogue that ALFWorld and WebShop share."""

    # characters at the end of a text without tags, which are sent all the same
    longest_stray_action: ClassVar[int]

    def __init__(self, config: EnvironmentConfig) -> None:
        self._length = config.history.length

    def action(self, text: str) -> Action:
        """The action as verl-agent reads it; of a text without tags the end."""
        return released_action(text, self.longest_stray_action)

    def written(self, action: str) -> str:
        """A text that takes an action."""
        return thought_and_action(action)

    def end_of_action(self, text: str) -> int | None:
        """The environment takes over at the end."""
        return None


def remembered(
    past: Sequence[Exchange], length: int, shown: Callable[[Observation], str]
) -> list[str]:
    """A line for each of the last `length` exchanges."""
    last = past[max(len(past) - length, 0) :]
    return [
        f"[Observation {k}: '{shown(exchange.observation)}', Action {k}: '{exchange.action}']"
        for k, exchange in enumerate(last, start=len(past) - len(last) + 1)
    ]
