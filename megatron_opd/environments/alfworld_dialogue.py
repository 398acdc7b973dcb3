"""The words between a model and ALFWorld, in the form of verl-agent's and SDAR's rows."""

from collections.abc import Sequence

from megatron_opd.contracts.environments import Exchange, Observation
from megatron_opd.environments.released_dialogue import ReleasedDialogue, remembered

ROLE = "You are an expert agent who acts in the household environment ALFRED."
HOW_TO_ANSWER = (
    "Take one step. Reason first, step by step, about where you stand and what to do next, between "
    "<think> and </think>. Then give one of the actions above, between <action> and </action>."
)


class AlfWorldDialogue(ReleasedDialogue):
    """Prompts and actions of ALFWorld. The first observation says what the task is; later prompts
    say it in a sentence."""

    longest_stray_action = 30

    def prompt(self, past: Sequence[Exchange], observation: Observation) -> str:
        if not past:
            return "\n".join([ROLE, f"You see: {observation.text}", *self._ending(observation)])
        lines = remembered(past, self._length, lambda seen: seen.text)
        steps = f"You have taken {len(past)} step(s) so far."
        if lines:
            steps += f" The last {len(lines)} observations, and what you did:"
        now = f"You are at step {len(past) + 1} and see: {observation.text}"
        task = f"Your task is to: {observation.task}"
        return "\n".join([ROLE, task, steps, *lines, now, *self._ending(observation)])

    def reply(self, observation: Observation) -> str:
        return "\n".join([observation.text, *self._ending(observation)])

    def _ending(self, observation: Observation) -> list[str]:
        actions = ",\n ".join(f"'{action}'" for action in observation.admissible or ())
        return [f"The actions that are possible now: [{actions}]", "", HOW_TO_ANSWER]
