"""The words between a model and WebShop, in the form of verl-agent's and SDAR's rows."""

from collections.abc import Sequence

from megatron_opd.contracts.environments import Exchange, Observation
from megatron_opd.environments.released_dialogue import ReleasedDialogue, remembered

SEPARATOR = " [SEP] "
LONGEST_PROMPT = 13000  # characters; a longer prompt leaves out the last exchanges, as verl-agent's

TURN = """\
You are an expert at shopping in the online shop WebShop.
Your task: {task}
{history}{now}: {observation}
The actions that the shop understands now:
[
{actions}
]

Take one step. Reason first about where you stand and which action brings you nearer to the right \
purchase, between <think> and </think>. Then give one of the actions above, between <action> and \
</action>.
"""
HISTORY = """\
You have taken {steps} step(s) so far. The last {shown} observations, and what you did:
{lines}
"""


class WebShopDialogue(ReleasedDialogue):
    """Prompts and actions of WebShop."""

    longest_stray_action = 20

    def prompt(self, past: Sequence[Exchange], observation: Observation) -> str:
        """The instruction, the last pages with what was done, this page, and what can be done."""
        prompt = self._prompt(past, observation, self._length)
        return prompt if len(prompt) <= LONGEST_PROMPT else self._prompt(past, observation, 0)

    def reply(self, observation: Observation) -> str:
        """The page, and what can be done on it."""
        return (
            f"{shown(observation)}\nThe actions that the shop understands now:\n"
            f"[\n{_actions(observation)}\n]\n"
        )

    def _prompt(self, past: Sequence[Exchange], observation: Observation, length: int) -> str:
        lines = remembered(past, length, shown)
        history = ""
        if lines:
            history = HISTORY.format(steps=len(past), shown=len(lines), lines="\n".join(lines))
        return TURN.format(
            task=observation.task,
            history=history,
            now=f"You are at step {len(past) + 1} and see" if lines else "You see",
            observation=shown(observation),
            actions=_actions(observation),
        )


def shown(observation: Observation) -> str:
    """A page behind the instruction, each part quoted; the whole page where it has none."""
    parts = observation.text.split(SEPARATOR)
    if observation.task not in parts:
        return observation.text
    behind = parts[parts.index(observation.task) + 1 :]
    return SEPARATOR.join(f"'{part}'" for part in behind)


def _actions(observation: Observation) -> str:
    return "\n".join(f"'{action}'," for action in observation.admissible or ())
