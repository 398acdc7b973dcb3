"""Conversations in a data file: the messages of a row, in any of three forms.

They are `role` and `content` (OpenAI, verl, TRL, LUFFY), `from` and `value` (ShareGPT), and either
of these as a JSON string.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

# Role, content, and further keys for the template, such as tool_calls.
Message = dict[str, object]

_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
_PYTHON_LIST = re.compile(r"\s*\[\s*\{\s*'(role|content|from|value)'")


class BadField(Exception):
    """A field of a row cannot be used.

    The message ends a sentence that begins with file and row.
    """


@dataclass(frozen=True)
class Problem:
    """A question to the model: a text, and the messages ahead of it."""

    text: str  # of the last message, the user's
    before: tuple[Message, ...] = ()  # the system message and earlier turns


def as_messages(value: object) -> list[Message] | None:
    """The messages of a field, with standard names; None if it has no conversation.

    Raises BadField for a conversation with a message that has no role or no content.
    """
    if isinstance(value, str):
        value = _from_json(value)
    if not isinstance(value, list) or not value:
        return None
    if not all(isinstance(message, dict) for message in value):
        return None
    return [_standard(message, number) for number, message in enumerate(value, start=1)]


def problem_of(messages: Sequence[Message], *, has_response: bool) -> Problem:
    """The problem of a conversation: its messages up to the user's last one.

    With `has_response` the conversation ends with the assistant's answer, which is left out. Raises
    BadField when it ends with another role than the user's.
    """
    end = len(messages)
    while has_response and end and messages[end - 1]["role"] == "assistant":
        end -= 1
    last = messages[end - 1] if end else None
    if last is None or last["role"] != "user":
        role = last["role"] if last else "assistant"
        raise BadField(
            f"the conversation ends with a message of {role}, where the user's must be; remove it"
        )
    if not isinstance(last["content"], str) or not last["content"].strip():
        raise BadField("no problem text in the last message; fill it or remove the row")
    return Problem(last["content"], tuple(messages[: end - 1]))


def _from_json(text: str) -> object:
    if not text.lstrip().startswith("["):
        return None
    if _PYTHON_LIST.match(text):
        raise BadField("messages written as a Python list; write them as JSON")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None  # a problem that begins with a bracket
    if not isinstance(value, list):
        return None
    for message in value:
        if not isinstance(message, dict) or not ("role" in message or "from" in message):
            return None
    return value


def _standard(message: Message, number: int) -> Message:
    standard_names = "role" in message
    role_key = "role" if standard_names else "from"
    content_key = "content" if standard_names else "value"
    role = message.get(role_key)
    if not isinstance(role, str) or not role:
        raise BadField(
            f"no problem text: message {number} has no role; give it role and content, or from and "
            "value"
        )
    content = message.get(content_key, message.get("content"))
    if isinstance(content, list):
        content = _joined(content, number)
    role = _ROLES.get(role.lower(), role.lower())
    calls_tools = content is None and role == "assistant" and message.get("tool_calls")
    if not isinstance(content, str) and not calls_tools:
        kind = "no" if content is None else f"{type(content).__name__} as its"
        raise BadField(
            f"no problem text: message {number} ({role}) has {kind} content; it must be text"
        )
    standard: Message = {"role": role, "content": content}
    for key, value in message.items():
        if key not in (role_key, content_key) and value is not None:
            standard[key] = value
    return standard


def _joined(entries: list[object], number: int) -> str:
    """The text of a content that is a list of entries."""
    texts = []
    for entry in entries:
        text = None
        if isinstance(entry, dict) and entry.get("type", "text") == "text":
            text = entry.get("text")
        if not isinstance(text, str):
            raise BadField(
                f"message {number} holds something that is not text; this project trains on text "
                "alone"
            )
        texts.append(text)
    return "".join(texts)
