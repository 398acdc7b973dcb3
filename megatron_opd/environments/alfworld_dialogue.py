"""The words between a model and ALFWorld, in the form of verl-agent's and SDAR's rows."""

from collections.abc import Sequence

from megatron_opd.contracts.environments import Action, Exchange, Observation
from megatron_opd.environments.tags import released_action, thought_and_action
from megatron_opd.recipe.agents import EnvironmentConfig

LONGEST_STRAY_ACTION = 30  # characters at the end of a text without tags

ROLE = "You are an expert agent who acts in the household environment ALFRED."
HOW_TO_ANSWER = (
    "Take one step. Reason first, step by step, about where you stand and what to do next, between "
    "<think> and </think>. Then give one of the actions above, between <action> and </action>."
)


class AlfWorldDialogue:
    """Prompts and actions of ALFWorld. The first observation says what the task is; later prompts
    say it in a sentence."""

    def __init__(self, config: EnvironmentConfig) -> None:
        self._length = config.history.length

    def prompt(self, past: Sequence[Exchange], observation: Observation) -> str:
        if not past:
            return "\n".join([ROLE, f"You see: {observation.text}", *self._ending(observation)])
        last = past[max(len(past) - self._length, 0) :]
        lines = [
            f"[Observation {k}: '{exchange.observation.text}', Action {k}: '{exchange.action}']"
            for k, exchange in enumerate(last, start=len(past) - len(last) + 1)
        ]
        steps = f"You have taken {len(past)} step(s) so far."
        if lines:
            steps += f" The last {len(last)} observations, and what you did:"
        now = f"You are at step {len(past) + 1} and see: {observation.text}"
        task = f"Your task is to: {observation.task}"
        return "\n".join([ROLE, task, steps, *lines, now, *self._ending(observation)])

    def reply(self, observation: Observation) -> str:
        return "\n".join([observation.text, *self._ending(observation)])

    def action(self, text: str) -> Action:
        """As verl-agent reads a text; without tags its end is sent."""
        return released_action(text, LONGEST_STRAY_ACTION)

    def written(self, action: str) -> str:
        """A text that takes an action."""
        return thought_and_action(action)

    def end_of_action(self, text: str) -> int | None:
        """At the end."""
        return None

    def _ending(self, observation: Observation) -> list[str]:
        actions = ",\n ".join(f"'{action}'" for action in observation.admissible or ())
        return [f"The actions that are possible now: [{actions}]", "", HOW_TO_ANSWER]
