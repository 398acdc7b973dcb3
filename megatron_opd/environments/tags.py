"""Actions between tags, as in <action>go</action>."""

import re

from megatron_opd.contracts.environments import Action

_CHINESE = re.compile("[\u4e00-\u9fff]")


def first_between(tag: str, text: str) -> str | None:
    """What stands between the first <tag> and the first </tag> behind it, stripped; None where
    there is no such pair."""
    match = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return match[1].strip() if match else None


def thought_and_action(action: str) -> str:
    """What a model writes to take an action."""
    return f"<think>so</think> <action>{action}</action>"


def released_action(text: str, longest_stray: int) -> Action:
    """As verl-agent's and SDAR's code reads a text: in lower case, from the first <action> to the
    first </action>.

    It is not valid without <think> and </think>, or with a Chinese character anywhere; it is taken
    all the same. Without tags the last `longest_stray` characters are.
    """
    lowered = text.lower()
    start, end = lowered.find("<action>"), lowered.find("</action>")
    if start < 0 or end < 0:
        return Action(lowered[-longest_stray:], valid=False)
    valid = "<think>" in text and "</think>" in text and not _CHINESE.search(text)
    return Action(lowered[start + len("<action>") : end].strip(), valid)
