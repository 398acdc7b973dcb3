"""The program in a completion, and its output against the expected one."""

import json
import re
import textwrap
from decimal import Decimal, InvalidOperation

MOST_DIGITS = 50_000  # of a number that a function returns
FEW_DIGITS = 4000

_FENCE = re.compile(r"\s*`{3,}(?P<words>[^`]*)")
# it opens a block outside of one: within, it may be a part of the code
_FENCE_BEHIND_WORDS = re.compile(r"[^`]*`{3,}\s*\w+\s*")


def program_in(text: str) -> str:
    """The last closed block between lines of ``` or longer; "" where there is none.

    The first fence may stand behind words ("Answer: ```python"). One that nothing closes is passed
    over, so that one too many at the end loses nothing.
    """
    program = ""
    block: list[str] | None = None
    for line in text.split("\n"):
        fence = _FENCE.fullmatch(line)
        if fence is None:
            if block is not None:
                block.append(line)
            elif _FENCE_BEHIND_WORDS.fullmatch(line):
                block = []
        elif block is None or fence["words"].strip():
            block = []
        else:
            program = "\n".join(block)
            block = None
    return textwrap.dedent(program).strip("\n")


def same_output(printed: bytes, expected: str) -> bool:
    """Whether lines are equal: without spaces around them, or as numbers, word by word."""
    ours = _lines(printed.decode(errors="replace"))
    theirs = _lines(expected)
    return len(ours) == len(theirs) and all(map(_same_line, ours, theirs))


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.strip().split("\n")]


def _same_line(ours: str, theirs: str) -> bool:
    if ours == theirs:
        return True
    try:
        numbers = [[Decimal(word) for word in line.split()] for line in (ours, theirs)]
        return numbers[0] == numbers[1]
    except InvalidOperation:  # a word that is no number, or a signalling one
        return False


def same_value(written: bytes, nonce: str, expected: str) -> bool:
    """Whether a function's value, as its process wrote it behind the nonce, is the expected one.

    Both are JSON, compared here, as Python compares: floats exactly, 1 with 1.0 and True.
    """
    head, _, value = written.partition(b"\n")
    if head != nonce.encode():
        return False
    try:
        return _value(value.decode()) == _value(expected)
    except (ValueError, RecursionError):
        return False


def _value(text: str) -> object:
    return json.loads(text, parse_int=_integer)


def _integer(digits: str) -> int | Decimal:
    """Python itself reads no more than some thousand digits from a text, and slowly."""
    if len(digits) > MOST_DIGITS:
        raise ValueError("too long a number")
    return int(digits) if len(digits) <= FEW_DIGITS else Decimal(digits)
