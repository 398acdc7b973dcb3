"""How the rows of published data become questions, by the form of the data.

A question's key is the data's id, or a digest of its words: never a position, so that rows may
move, come and go.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal

from megatron_opd.contracts.suites import Question
from megatron_opd.suites.suite import FormName

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
Values = Mapping[str, object]  # by field


class BadRow(Exception):
    """A row that makes no question; the message says what is wrong in it."""


@dataclass(frozen=True)
class Form:
    """The fields of a form, with their columns in the data, and the question they make."""

    columns: Mapping[str, tuple[str, ...]]  # that must be there: any of these names
    question: Callable[[Values], Question]
    more: Mapping[str, tuple[str, ...]] | None = None  # that are read where they are there


def digest(*texts: str) -> str:
    """A short name of texts, which depends on nothing else."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def _math(values: Values) -> Question:
    text = _words(values, "problem")
    gold = _gold(values["answer"])
    return Question(_key(values, text), text, gold, group=_group(values))


def _olympiad(values: Values) -> Question:
    text = _words(values, "problem")
    gold = _gold(values["answer"])
    details = {
        "several": bool(values.get("is_multiple_answer")),
        "kind": str(values.get("answer_type") or ""),
        "error": str(values.get("error") or ""),
    }
    return Question(_key(values, text), text, gold, group=_group(values), details=details)


def _choice(values: Values) -> Question:
    """Options as a list; the answer is a letter, a place from 0, or an option's text."""
    return _of_options(values, _texts(values["options"]), values["answer"])


def _mmlu_pro(values: Values) -> Question:
    options = [text for text in _texts(values["options"]) if text != "N/A"]  # the first edition's
    return _of_options(values, options, values["answer"])


def _arc(values: Values) -> Question:
    choices = values["options"]
    if not isinstance(choices, dict) or {"text", "label"} - choices.keys():
        raise BadRow("choices must have text and label")
    labels = _texts(choices["label"])
    if str(values["answer"]) not in labels:
        raise BadRow(f"answerKey {values['answer']!r} is none of the labels {', '.join(labels)}")
    return _of_options(values, _texts(choices["text"]), labels.index(str(values["answer"])))


def _gpqa(values: Values) -> Question:
    names = ("right", "wrong_1", "wrong_2", "wrong_3")
    return _of_options(values, [_words(values, name).strip() for name in names], 0)


def _instructions(values: Values) -> Question:
    text = _words(values, "problem")
    ids = _texts(values["instructions"])
    arguments = _json(values["arguments"])
    if not isinstance(arguments, list) or len(arguments) != len(ids):
        raise BadRow("kwargs must be a list with one entry per instruction")
    entries = [_json(entry) or {} for entry in arguments]
    used = [
        {name: value for name, value in entry.items() if value is not None}
        for entry in entries
        if isinstance(entry, dict)
    ]
    details = {"instructions": ids, "arguments": used}
    return Question(_key(values, text), text, "", details=details)


def _code(values: Values) -> Question:
    text = _words(values, "problem")
    details = {
        name: _as_text(values.get(name))
        for name in (*_CODE_COLUMNS, "contest_id", "difficulty")
        if name != "problem"
    }
    return Question(
        _key(values, text), text, "", group=details["difficulty"] or "", details=details
    )


_CODE_COLUMNS = {
    "problem": ("question_content",),
    "id": ("question_id",),
    "title": ("question_title",),
    "platform": ("platform",),
    "contest_date": ("contest_date",),
    "starter_code": ("starter_code",),
    "public_test_cases": ("public_test_cases",),
    "private_test_cases": ("private_test_cases",),
    "metadata": ("metadata",),
}
_PROBLEM = ("problem", "question", "prompt")
_ANSWER = ("answer", "final_answer", "expected_answer", "reward_model.ground_truth")
_ID = ("id", "unique_id", "question_id", "problem_idx")
_GROUP = ("subject", "level", "subfield", "category", "source_subject")
FORMS: Mapping[FormName, Form] = {
    "math": Form(
        {"problem": _PROBLEM, "answer": _ANSWER}, _math, {"id": _ID, "group": _GROUP}
    ),
    "olympiad": Form(
        {"problem": ("question", "problem"), "answer": ("final_answer", "answer")},
        _olympiad,
        {
            "id": _ID, "group": _GROUP, "is_multiple_answer": ("is_multiple_answer",),
            "answer_type": ("answer_type",), "error": ("error",),
        },
    ),
    "choice": Form(
        {"problem": _PROBLEM, "options": ("options", "choices"), "answer": _ANSWER},
        _choice,
        {"id": _ID, "group": _GROUP},
    ),
    "mmlu_pro": Form(
        {"problem": ("question",), "options": ("options",), "answer": ("answer",)},
        _mmlu_pro,
        {"id": ("question_id",), "group": ("category",)},
    ),
    "arc": Form(
        {"problem": ("question",), "options": ("choices",), "answer": ("answerKey",)},
        _arc,
        {"id": ("id",)},
    ),
    "gpqa": Form(
        {
            "problem": ("Question",), "right": ("Correct Answer",),
            "wrong_1": ("Incorrect Answer 1",), "wrong_2": ("Incorrect Answer 2",),
            "wrong_3": ("Incorrect Answer 3",),
        },
        _gpqa,
        {"id": ("Record ID",), "group": ("High-level domain", "Subdomain")},
    ),
    "redux": Form(
        {"problem": ("question",), "options": ("choices",), "answer": ("answer",)},
        _choice,
        {"group": ("subject", "config", "folder")},
    ),
    "instructions": Form(
        {
            "id": ("key",), "problem": ("prompt",), "instructions": ("instruction_id_list",),
            "arguments": ("kwargs",),
        },
        _instructions,
    ),
    "code": Form(
        _CODE_COLUMNS, _code, {"contest_id": ("contest_id",), "difficulty": ("difficulty",)}
    ),
}  # fmt: skip


def _of_options(values: Values, options: list[str], answer: object) -> Question:
    text = _words(values, "problem")
    if not 2 <= len(options) <= len(LETTERS):
        raise BadRow(f"{len(options)} options; there must be 2 to {len(LETTERS)}")
    place = _place(answer, options)
    key = _key(values, text, *options)
    return Question(key, text, LETTERS[place], tuple(options), group=_group(values))


def _place(answer: object, options: list[str]) -> int:
    """The place of the right option from 0, given as that, as a letter or as the option."""
    place = -1
    text = str(answer).strip()
    if isinstance(answer, int) or (text.isdecimal() and text not in options):
        place = int(text)
    elif len(text) == 1 and text in LETTERS:
        place = LETTERS.index(text)
    elif text in options:
        place = options.index(text)
    if not 0 <= place < len(options):
        raise BadRow(f"answer {answer!r:.60} is none of its {len(options)} options")
    return place


def _key(values: Values, *texts: str) -> str:
    given = values.get("id")
    return str(given) if given not in (None, "") else digest(*texts)


def _group(values: Values) -> str:
    value = values.get("group")
    return "" if value is None else str(value)


def _words(values: Values, name: str) -> str:
    """A text, or what a user says last in a list of messages."""
    value = values[name]
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        value = value[-1].get("content")
    if not isinstance(value, str) or not value.strip():
        raise BadRow(f"no text for {name}")
    return value


def _gold(value: object) -> str:
    """A gold answer as text: of a number, of a text, or of a list of one of them."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, list):
        value = ", ".join(map(str, value))
    if isinstance(value, float):
        value = f"{Decimal(repr(value)):f}"  # without an exponent
    if value is None or isinstance(value, bool) or not str(value).strip():
        raise BadRow("no answer")
    return str(value).strip()


def _as_text(value: object) -> str:
    """A value as text, a list or a mapping as JSON; copies of data differ in which they hold."""
    if isinstance(value, list | dict):
        return json.dumps(value)
    return "" if value is None else str(value)


def _texts(value: object) -> list[str]:
    value = _json(value)
    if not isinstance(value, list):
        raise BadRow(f"a {type(value).__name__} where a list must be")
    return [str(item) for item in value]


def _json(value: object) -> object:
    """A value that a table may hold as JSON text."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value
