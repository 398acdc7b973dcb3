"""Privileged texts that stand with a prompt, and what chooses them. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, assert_never

# Role, content, and further keys for a chat template.
Message = dict[str, object]
# In the system message, ahead of the user's message, or ahead of the whole prompt and outside of
# any message.
Place = Literal["system", "user", "raw_prefix"]
# Task type, name of the skill, mean success of the group that it was retrieved for.
Pull = tuple[str, str, float]


@dataclass(frozen=True)
class Skill:
    """A privileged text that was retrieved for an episode."""

    name: str
    text: str

    def within(self, messages: Sequence[Message], place: Place) -> list[Message]:
        """The messages of a prompt with the text; as they are where it stands outside of them.

        `messages` have one of the user's. The text goes behind what the system message says, and
        ahead of what the user's last message says.
        """
        match place:
            case "system":
                return _in_system(messages, self.text)
            case "user":
                return _ahead_of_user(messages, self.text)
            case "raw_prefix":
                return list(messages)
            case _:
                assert_never(place)

    def ahead(self, place: Place) -> str:
        """What stands ahead of the whole rendered prompt; "" where the text is in a message.

        The words are those of SDAR's released code.
        """
        if place != "raw_prefix":
            return ""
        return f"[Privileged Skill Information]\n{self.text}\n\n"


class Retriever(Protocol):
    """Chooses the skill of an episode. Equal calls give equal skills, on every process."""

    def retrieve(self, task_type: str, task: str, group_key: tuple[int, int]) -> Skill:
        """The skill of a task: its kind, its words, and (step, number of the task), so that the
        episodes of one group read the same."""

    def learn(self, pulls: Sequence[Pull]) -> None:
        """Takes what became of a step's retrievals, one pull per group. All processes give the
        same."""

    def state_dict(self) -> dict[str, object]:
        """What `learn` has gathered, as JSON."""

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Goes on from a state."""


def _in_system(messages: Sequence[Message], text: str) -> list[Message]:
    first = messages[0]
    if first["role"] not in ("system", "developer"):
        return [{"role": "system", "content": text}, *messages]
    return [{**first, "content": f"{first['content']}\n\n{text}"}, *messages[1:]]


def _ahead_of_user(messages: Sequence[Message], text: str) -> list[Message]:
    last = max(place for place, message in enumerate(messages) if message["role"] == "user")
    changed = {**messages[last], "content": f"{text}\n\n{messages[last]['content']}"}
    return [*messages[:last], changed, *messages[last + 1 :]]
