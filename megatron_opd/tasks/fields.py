"""The columns of a data file that have problem, gold answer and trace, and their values.

`auto` reads plain files (prompt | problem | question, answer, response), OpenR1-Math (problem,
answer, generations with correctness flags), DAPO-Math-17k and verl (prompt as messages,
reward_model.ground_truth), and conversations (messages | conversations).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from megatron_opd.errors import DataError
from megatron_opd.files.rows import Row
from megatron_opd.recipe.data import DataConfig
from megatron_opd.tasks.messages import BadField, Problem, as_messages, problem_of

CONVERSATION_COLUMNS = ("messages", "conversations")  # they end with the response
PROBLEM_COLUMNS = ("prompt", "problem", "question", *CONVERSATION_COLUMNS)
ANSWER_COLUMNS = ("answer", "reward_model.ground_truth", "solution")
TRACE_COLUMNS = ("response", "target", "generations", "completion", *CONVERSATION_COLUMNS)
# The texts that tables write for a value that is not there.
MISSING = frozenset({"nan", "NaN", "<NA>", "None", "null", "inf", "-inf", "Infinity", "-Infinity"})
VERIFIED_COLUMNS = ("correctness_math_verify", "correctness_llama")  # one flag per generation
_SHOWN_COLUMNS = 20


@dataclass(frozen=True)
class Fields:
    """The columns chosen for a file; None for one that is neither there nor needed.

    A name with a dot is a column's, or else that of a value within a nested column.
    """

    problem: str
    answer: str | None
    trace: str | None
    source: str | None = None
    level: str | None = None

    def to_read(self, names: Sequence[str]) -> list[str]:
        """The top-level columns, among a Parquet file's `names`, to read from it."""
        names_of_fields = (self.problem, self.answer, self.trace, self.source, self.level)
        chosen = [name for name in names_of_fields if name]
        outer = [name.partition(".")[0] for name in chosen]
        return [name for name in dict.fromkeys(chosen + outer) if name in names]


def choose_columns(
    path: Path,
    names: Sequence[str],
    config: DataConfig,
    key: str,
    *,
    need_answer: bool,
    need_trace: bool,
) -> Fields:
    """Chooses among the columns `names` of a file; nested ones are `outer.inner`.

    `key` is the recipe's key of the file. Raises DataError, naming the file's columns and the key
    to set, when a needed column is not there.
    """

    def choose(field: str, configured: str, known: Sequence[str], needed: bool) -> str | None:
        candidates = known if configured == "auto" else (configured,)
        for name in candidates:
            if name in names or (configured != "auto" and name.partition(".")[0] in names):
                return name
        if not needed:
            return None
        remedy = f"set data.{field}_column"
        if field == "curriculum":
            raise DataError(
                f"{path}: no column {configured} among those found ({_shown(names)}); set "
                "data.curriculum.column"
            )
        if key == "data.heldout":
            remedy = f"set data.heldout={{path: ..., {field}_column: ...}}"
        elif key != "data.train":
            remedy = f"set {key}.{field}_column"
        raise DataError(
            f"{path}: no column {' | '.join(candidates)} among those found ({_shown(names)}); "
            f"{remedy}"
        )

    problem = choose("problem", config.problem_column, PROBLEM_COLUMNS, needed=True)
    assert problem is not None
    answer = choose("answer", config.answer_column, ANSWER_COLUMNS, need_answer)
    trace = choose("trace", config.trace_column, TRACE_COLUMNS, need_trace) if need_trace else None
    source = (
        choose("source", config.source_column, (), needed=True) if config.source_column else None
    )
    level = None
    if config.curriculum:
        level = choose("curriculum", config.curriculum.column, (), needed=True)
    return Fields(problem, answer, trace, source, level)


def _shown(names: Sequence[str]) -> str:
    printable = [name if name.isprintable() else ascii(name) for name in names]
    shown = ", ".join(printable[:_SHOWN_COLUMNS])
    left_out = len(names) - _SHOWN_COLUMNS
    return f"{shown} and {left_out} more" if left_out > 0 else shown


def verified_columns(names: Sequence[str]) -> list[str]:
    """The columns among `names` that say which generations are right."""
    return [name for name in VERIFIED_COLUMNS if name in names]


def read_problem(row: Row, columns: Fields) -> Problem:
    """The problem: a text, or a conversation. Raises BadField when there is none."""
    name = columns.problem
    value = _lookup(row, name)
    messages = as_messages(value)
    if messages is not None:
        return problem_of(messages, has_response=name in (columns.trace, *CONVERSATION_COLUMNS))
    if value is None or value in ("", [], {}) or (isinstance(value, str) and not value.strip()):
        raise BadField(f"no problem text in column {name}; fill it or remove the row")
    if not isinstance(value, str):
        raise BadField(
            f"column {name} holds {type(value).__name__}; it must be text or a list of messages"
        )
    return Problem(value)


def read_answer(row: Row, columns: Fields) -> str | None:
    """The gold answer as text, or None when it is missing, blank or a number that is not finite."""
    value = _lookup(row, columns.answer) if columns.answer else None
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        value = _digits(value)
    text = _text(value)
    return text.strip() if text and text.strip() not in MISSING else None


def _digits(number: int | float | Decimal) -> str | None:
    """The number without an exponent: "0.00001", not "1e-05", whose e reads as Euler's number.

    None if it is not finite.
    """
    decimal = Decimal(str(number))
    return f"{decimal:f}" if decimal.is_finite() else None


def read_trace(row: Row, columns: Fields) -> str | None:
    """The trace: a text, the last assistant message, or the first generation flagged as right.

    None when it is missing. Raises BadField for messages that cannot be read.
    """
    value = _lookup(row, columns.trace) if columns.trace else None
    messages = as_messages(value)
    if messages is not None:
        responses = [message["content"] for message in messages if message["role"] == "assistant"]
        return _text(responses[-1]) if responses else None
    return _first_verified(row, value) if isinstance(value, list) else _text(value)


def read_source(row: Row, columns: Fields) -> str:
    """The source of a row; "" if nobody asks. Raises BadField when the row has none."""
    if columns.source is None:
        return ""
    value = _lookup(row, columns.source)
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise BadField(f"no source in column {columns.source}; fill it or remove the row")
    return str(value)


def read_level(row: Row, columns: Fields) -> float:
    """The number of a row in a curriculum; 0 if nobody asks. Raises BadField when it has none."""
    if columns.level is None:
        return 0.0
    value = _lookup(row, columns.level)
    is_number = isinstance(value, int | float | Decimal) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value):
        raise BadField(f"no number in column {columns.level}; fill it or remove the row")
    return float(value)


def _first_verified(row: Row, generations: list[Any]) -> str | None:
    flags_by_verifier = [row[name] for name in VERIFIED_COLUMNS if isinstance(row.get(name), list)]
    if not flags_by_verifier:
        return _text(generations[0]) if generations else None
    for flags in flags_by_verifier:
        for generation, is_right in zip(generations, flags, strict=False):
            if is_right and _text(generation):
                return _text(generation)
    return None


def _lookup(row: Row, name: str) -> Any:
    if name in row:
        return row[name]
    value: Any = row
    for key in name.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value.strip() else None
