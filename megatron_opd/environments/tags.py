"""Actions between tags, as in <action>go</action>."""

import re


def first_between(tag: str, text: str) -> str | None:
    """What stands between the first <tag> and the first </tag> behind it, stripped; None where
    there is no such pair."""
    match = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return match[1].strip() if match else None
