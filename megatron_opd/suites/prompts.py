"""How questions are asked: the words around them, and the order of their options."""

import hashlib
import re
from typing import Literal, assert_never

from megatron_opd.contracts.suites import Asked, GraderName, Question, SuiteProtocol
from megatron_opd.suites.forms import LETTERS

PLAIN = "{problem}"
MATH = "{problem}\n\nReason step by step, and put the final answer in \\boxed{}."
PLAIN_CHOICE = "{problem}\n\n{options}"
CHOICE = (
    "{problem}\n\n{options}\n\nReason step by step, and put the letter of the right option in "
    "\\boxed{}."
)
CODE = (
    "Write a Python program for the following problem. It must pass all tests, those that are "
    "shown and others.\n\n{problem}\n\n{form}"
)
_MARK = re.compile(r"\{(problem|options|form)\}")
_FROM_INPUT = (
    "Read the input from standard input and write the answer to standard output. Give the whole "
    "program in one block:\n\n```python\n# your program\n```"
)
_FROM_START = (
    "Complete this program, and keep its names and parameters. Give the whole program in one "
    "block:\n\n```python\n{start}\n```"
)


def usual(grader: GraderName, *, plain: bool = False) -> str:
    """The words of a grader's suites; `plain`: without what a system message says already."""
    match grader:
        case "math" | "math_legacy":
            return PLAIN if plain else MATH
        case "choice":
            return PLAIN_CHOICE if plain else CHOICE
        case "instructions":
            return PLAIN
        case "code":
            return CODE
        case _:
            assert_never(grader)


def ask(question: Question, sample: int, protocol: SuiteProtocol, seed: int) -> Asked:
    """A question as one sample reads it; the order of its options depends on (seed, its words,
    sample) alone."""
    order = order_of(question, sample, protocol.shuffle, seed)
    gold = question.gold
    if order:
        gold = LETTERS[order.index(LETTERS.index(question.gold))]
    options = "\n".join(f"{LETTERS[n]}. {question.options[k]}" for n, k in enumerate(order))
    texts = {"problem": question.text, "options": options, "form": _form(question)}
    # Not str.format: questions are full of braces, and may have one of the marks.
    words = _MARK.sub(lambda mark: texts[mark[1]], protocol.prompt)
    return Asked(question, sample, words, gold, order)


def order_of(
    question: Question, sample: int, shuffle: Literal["none", "question", "sample"], seed: int
) -> tuple[int, ...]:
    """The place in the data of every option as a sample reads them; () without options."""
    places = range(len(question.options))
    match shuffle:
        case "none":
            return tuple(places)
        case "question":
            words = f"{seed}\0{question.text}"
        case "sample":
            words = f"{seed}\0{question.text}\0{sample}"
    # Every option's rank is a number of its own: the order needs no generator and is the same
    # everywhere.
    return tuple(sorted(places, key=lambda place: _hashed(f"{words}\0{place}")))


def _hashed(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _form(question: Question) -> str:
    """How the program that answers a question is to be written."""
    start = str(question.details.get("starter_code") or "").rstrip()
    return _FROM_START.replace("{start}", start) if start else _FROM_INPUT
