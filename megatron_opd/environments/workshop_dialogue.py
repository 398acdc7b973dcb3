"""The workshop's words: few enough for a tokenizer with a token per word."""

from collections.abc import Sequence

from megatron_opd.contracts.environments import Action, Exchange, Observation
from megatron_opd.environments import workshop
from megatron_opd.environments.tags import first_between
from megatron_opd.recipe.agents import EnvironmentConfig

NO_ACTION = "none"  # what the environment is told where a text has no action
# Every word of prompts, replies, actions and skills; blanks separate them.
WORDS = (
    "<task>", "</task>", "<past>", "</past>", "<now>", "</now>", "<act>", "</act>", "<skill>",
    "</skill>", NO_ACTION, "open", "use", "in", "with", ".",
    workshop.WITHOUT, workshop.WITH,
    workshop.NOTHING, workshop.GOT, workshop.FAILED, workshop.WORKED,
    *workshop.ITEMS, *workshop.PLACES, *workshop.JOBS, *workshop.TOOLS,
)  # fmt: skip


class WorkshopDialogue:
    """A prompt is `<task> chill mug </task> <past> open shelf nothing </past> <now> hall </now>`,
    an answer `<act> open drawer </act>`."""

    def __init__(self, config: EnvironmentConfig) -> None:
        self.length = config.history.length

    def prompt(self, past: Sequence[Exchange], observation: Observation) -> str:
        seen = [exchange.observation for exchange in past[1:]] + [observation]
        triples = [
            f"{exchange.action} {_outcome(after)}"
            for exchange, after in zip(past, seen, strict=False)
        ]
        shown = triples[max(len(triples) - self.length, 0) :]
        remembered = f"<past> {' '.join(shown)} </past> " if shown else ""
        now = observation.text.split()[-1]
        return f"<task> {observation.task} </task> {remembered}<now> {now} </now>"

    def reply(self, observation: Observation) -> str:
        return f" <now> {observation.text} </now> "

    def action(self, text: str) -> Action:
        words = (first_between("act", text) or "").split()
        if len(words) == 2 and words[0] in ("open", "use") and words[1] in WORDS:
            return Action(" ".join(words))
        return Action(NO_ACTION, valid=False)

    def written(self, action: str) -> str:
        """A text that takes an action."""
        return answer(action)

    def end_of_action(self, text: str) -> int | None:
        return None


def answer(action: str) -> str:
    """What a model writes to take an action."""
    return f"<act> {action} </act>"


def _outcome(observation: Observation) -> str:
    return observation.text.split()[0]
