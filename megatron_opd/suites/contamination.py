"""How many questions of a suite occur in training problems: exactly, or with 13 words in a row.

A word is a run of letters or digits, in small letters, so that LaTeX's and Markdown's marks do not
hide a copy. 13 words are what the reports of language models count.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_opd.contracts.suites import Question

WORDS_IN_A_ROW = 13
_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True)
class Contamination:
    """Which questions of a suite training problems have."""

    questions: int
    problems: int  # training problems compared
    exact: tuple[str, ...]  # keys of questions whose words are those of a problem
    overlapping: tuple[str, ...]  # keys of those that share WORDS_IN_A_ROW with one, exact too
    short: int  # questions with fewer words, which can only be exact


def contamination(questions: Sequence[Question], problems: Iterable[str]) -> Contamination:
    """Compares the questions' texts, without their options, with training problems.

    Holds the words of the questions, and reads the problems once.
    """
    whole: dict[tuple[str, ...], list[str]] = {}
    runs: dict[tuple[str, ...], list[str]] = {}
    short = 0
    for question in questions:
        words = _words(question.text)
        whole.setdefault(words, []).append(question.key)
        short += len(words) < WORDS_IN_A_ROW
        for run in _runs(words):
            runs.setdefault(run, []).append(question.key)
    exact: set[str] = set()
    overlapping: set[str] = set()
    count = 0
    for problem in problems:
        count += 1
        words = _words(problem)
        exact.update(whole.get(words, ()))
        for run in _runs(words):
            overlapping.update(runs.get(run, ()))
    keys = [question.key for question in questions]
    return Contamination(
        len(questions),
        count,
        tuple(key for key in keys if key in exact),
        tuple(key for key in keys if key in exact | overlapping),
        short,
    )


def _words(text: str) -> tuple[str, ...]:
    return tuple(_WORD.findall(text.casefold()))


def _runs(words: tuple[str, ...]) -> set[tuple[str, ...]]:
    """All runs of the length that counts."""
    starts = range(len(words) - WORDS_IN_A_ROW + 1)
    return {words[start : start + WORDS_IN_A_ROW] for start in starts}
