"""Which part of a completion is its answer, and the answers that need no computer algebra: linear in the text."""

import re

TAIL_CHARACTERS = 1000  # without a box, the answer is looked for in the completion's last characters

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACE_OR_ESCAPE = re.compile(r"\\.|[{}]", re.DOTALL)
# Canonical, and short enough that math-verify's 15-digit numeric comparison is exact on it.
_PLAIN_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,11}")


def final_answer(text: str) -> str | None:
    """Return the last `\\boxed{...}` of a completion, or its tail when it has none; None when there is no answer.

    A last box that is empty or never closed (a truncated completion) is no answer: an earlier box or number does not
    stand in for it.
    """
    last_box = max(_BOX.finditer(text), key=re.Match.start, default=None)
    if last_box is None:
        return text[-TAIL_CHARACTERS:].strip() or None
    start, depth = last_box.end(), 1
    for token in _BRACE_OR_ESCAPE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(token.group(), 0)
        if depth == 0:
            content = text[start : token.start()].strip()
            return boxed(content) if content else None
    return None


def boxed(content: str) -> str:
    return f"\\boxed{{{content}}}"


def compare_plain_integers(answer: str, gold: str) -> str | None:
    """Return "correct" or "wrong" when both sides are plain integers, as math-verify would; None: ask math-verify."""
    content = answer.removeprefix("\\boxed{").removesuffix("}")
    if boxed(content) != answer or not (_PLAIN_INTEGER.fullmatch(content) and _PLAIN_INTEGER.fullmatch(gold)):
        return None
    return "correct" if content == gold else "wrong"
