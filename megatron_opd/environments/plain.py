"""A dialogue for any environment: it asks for thoughts, and for one action between tags."""

from collections.abc import Sequence

from megatron_opd.contracts.environments import Action, Exchange, Observation
from megatron_opd.environments.tags import first_between, thought_and_action
from megatron_opd.recipe.agents import EnvironmentConfig

MOST_CHARACTERS = 200  # of an action without tags, which is what a text ends with
HOW_TO_ANSWER = (
    "Think about what to do next, and write your thoughts between <think> and </think>. Then write "
    "one action between <action> and </action>."
)


class PlainDialogue:
    """The task, the last exchanges, what is seen now, the actions that are understood, and how to
    answer."""

    def __init__(self, config: EnvironmentConfig) -> None:
        self.length = config.history.length

    def prompt(self, past: Sequence[Exchange], observation: Observation) -> str:
        parts = []
        if observation.task:
            parts.append(f"Your task: {observation.task}")
        first = max(len(past) - self.length, 0)
        lines = [
            f"Observation {number}: {exchange.observation.text}\nAction {number}: {exchange.action}"
            for number, exchange in enumerate(past[first:], start=first + 1)
        ]
        if lines:
            parts.append("\n".join([f"Your last steps, of {len(past)}:", *lines]))
        parts.append(f"Observation {len(past) + 1}: {observation.text}")
        return "\n\n".join([*parts, *self._ending(observation)])

    def reply(self, observation: Observation) -> str:
        return "\n\n".join([observation.text, *self._ending(observation)])

    def action(self, text: str) -> Action:
        """An action without tags is sent all the same, and is not valid."""
        if action := first_between("action", text):
            return Action(action)
        return Action(text.strip()[-MOST_CHARACTERS:], valid=False)

    def written(self, action: str) -> str:
        """A text that takes an action."""
        return thought_and_action(action)

    def end_of_action(self, text: str) -> int | None:
        return None

    def _ending(self, observation: Observation) -> list[str]:
        actions = observation.admissible
        listed = [f"The actions you can take now: {', '.join(actions)}"] if actions else []
        return [*listed, HOW_TO_ANSWER]
