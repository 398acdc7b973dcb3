"""The categories of a bank that a task belongs to."""

import re
from collections.abc import Callable, Sequence

from megatron_opd.skills.bank import Bank, Category

Match = Callable[[Bank, str, str], tuple[Category, ...]]


def by_words(bank: Bank, task_type: str, task: str) -> tuple[Category, ...]:
    """The category that the kind of task names, or else all whose keywords the task's words have.

    A kind names a category whose words it has, in their order; of several, the one of most words.
    A keyword may stand in the plural.
    """
    best: list[tuple[int, Category]] = []
    for category in bank.categories:
        lengths = [
            len(_words(kind)) for kind in category.task_types if _has_in_order(task_type, kind)
        ]
        if lengths:
            best.append((max(lengths), category))
    if best:
        most = max(length for length, _ in best)
        return tuple(category for length, category in best if length == most)
    return _of_keywords(bank, lambda word: _has_word(task, word))


def by_substring(bank: Bank, task_type: str, task: str) -> tuple[Category, ...]:
    """As SDAR's released code: the first kind that is part of the task's kind, or else all
    categories with a keyword that is part of the task's text ("hat" of "that")."""
    for category in bank.categories:
        if any(kind in task_type for kind in category.task_types):
            return (category,)
    return _of_keywords(bank, lambda word: word in task.lower())


def _of_keywords(bank: Bank, has: Callable[[str], bool]) -> tuple[Category, ...]:
    return tuple(category for category in bank.categories if any(map(has, category.keywords)))


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def _has_in_order(text: str, wanted: str) -> bool:
    rest = iter(_words(text))
    words = _words(wanted)
    return bool(words) and all(word in rest for word in words)


def _has_word(text: str, word: str) -> bool:
    return bool(re.search(rf"(?<!\w){re.escape(word)}(?:s|es)?(?!\w)", text.lower()))


def names_of(categories: Sequence[Category]) -> str:
    """A name for the texts of some categories."""
    return "+".join(category.name for category in categories) or "general"
