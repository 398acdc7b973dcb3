"""What rewards read of a data file's row beside its gold answer: options, and a program's tests."""

import json
import re
from collections.abc import Mapping, Sequence

from megatron_opd.contracts.rows import Task

_UNKNOWN_OPTIONS = ("",) * 10  # of a row without their words
_LETTER = re.compile(r"\(?\s*([A-Za-z])\s*[).:]?")
TEST_COLUMNS = ("public_test_cases", "private_test_cases")  # LiveCodeBench's
INPUT_OUTPUT = "input_output"  # that of APPS and TACO


def options_of(columns: Mapping[str, object], name: str) -> tuple[str, ...] | None:
    """The words of a question's options: a list, an object by letter, or ARC's {text: [...]}.

    Ten unknown ones where the row has no such column; None for a column that has no two texts.
    """
    value = parsed(columns.get(name))
    if value is None:
        return _UNKNOWN_OPTIONS
    if isinstance(value, Mapping):
        texts = value.get("text")
        value = texts if isinstance(texts, list) else [value[key] for key in sorted(value)]
    if not isinstance(value, list) or len(value) < 2:
        return None
    return tuple(str(option) for option in value)


def gold_letter(gold: str, options: Sequence[str]) -> str | None:
    """The letter of the right option: the gold answer, or that of the option with its words."""
    letters = [chr(ord("A") + place) for place in range(len(options))]
    match = _LETTER.fullmatch(gold.strip())
    if match and match[1].upper() in letters:
        return match[1].upper()
    same = [place for place, option in enumerate(options) if option.strip() == gold.strip()]
    return letters[same[0]] if len(same) == 1 and gold.strip() else None


def program_tests(task: Task) -> Mapping[str, object]:
    """A program's tests as LiveCodeBench's columns: the row's own, or those made of {inputs,
    outputs}, which stand in `input_output` or are the gold answer."""
    columns = task.columns
    if any(columns.get(name) for name in TEST_COLUMNS):
        return columns
    pairs = parsed(columns.get(INPUT_OUTPUT)) or parsed(task.answer)
    if not isinstance(pairs, Mapping) or pairs.get("fn_name"):
        return {}  # a function's values are written in more than one way there
    inputs = pairs.get("inputs")
    outputs = pairs.get("outputs")
    if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
        return {}
    tests = [
        {"input": _lines(given), "output": _lines(expected), "testtype": "stdin"}
        for given, expected in zip(inputs, outputs, strict=True)
    ]
    return {TEST_COLUMNS[0]: tests}


def parsed(value: object) -> object:
    """A column's value; a text is JSON where it can be read as such. None for nothing."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError):
        return value


def _lines(value: object) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)
