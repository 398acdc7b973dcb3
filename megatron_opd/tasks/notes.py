"""Rows of a data set that are odd without being wrong: they are counted and warned of."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_opd.contracts.rows import Task
from megatron_opd.recipe.data import TemplateConfig
from megatron_opd.tasks.messages import Message
from megatron_opd.tasks.template import system_text


@dataclass
class _Count:
    count: int = 0
    first: str = ""

    def add(self, where: str) -> None:
        self.first = self.first or where
        self.count += 1


class Notes:
    """Counts of prompts that repeat another, of system messages not used, and of lost messages."""

    def __init__(self, template: TemplateConfig) -> None:
        self._system = system_text(template)
        self._is_chat = template.kind == "chat"
        self._places: dict[str, str] = {}
        self._repeated = _Count()
        self._own_system = _Count()
        self._left_out = _Count()
        self._rows = 0

    def add(self, task: Task, before: Sequence[Message], where: str) -> None:
        """Counts a task, with the messages before its problem; `where` is its file and row."""
        self._rows += 1
        earlier = self._places.setdefault(task.text, where)
        if earlier != where:
            self._repeated.add(f"{where} is {earlier}")
        system = [m["content"] for m in before if m["role"] in ("system", "developer")]
        if self._system is not None and system and system[0] != self._system:
            self._own_system.add(where)
        shown = all(_shows(content, task.text) for content in (*system, task.problem))
        if self._is_chat and not shown:
            self._left_out.add(where)

    def warn(self, key: str, warn: Callable[[str], None]) -> None:
        """Calls `warn` with a line for each count that is not 0."""
        if self._repeated.count:
            warn(
                f"{key}: {self._repeated.count} of {self._rows} prompts repeat another; "
                f"{self._repeated.first}"
            )
        if self._own_system.count:
            warn(
                f"data.template.system: not used by {self._own_system.count} of {self._rows} "
                f"prompts of {key}, which have a system message of their own; the first: "
                f"{self._own_system.first}"
            )
        if self._left_out.count:
            warn(
                f"{key}: the chat template leaves out the system message or the problem of "
                f"{self._left_out.count} of {self._rows} prompts; the first: {self._left_out.first}"
            )


def _shows(content: object, text: str) -> bool:
    return not isinstance(content, str) or content.strip() in text
