"""Where a row keeps its problem, its gold answer and its trace.

`auto` reads plain files (prompt | problem | question, answer, response), OpenR1-Math (problem, answer, generations
with correctness flags), and DAPO-Math-17k (prompt as messages, reward_model.ground_truth).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from megatron_opd.config.schema import DataConfig
from megatron_opd.errors import DataError
from megatron_opd.prompts.rows import Row

PROBLEM_COLUMNS = ("prompt", "problem", "question")
ANSWER_COLUMNS = ("answer", "reward_model.ground_truth", "solution")
TRACE_COLUMNS = ("response", "target", "generations", "messages")
# How tables write a value that is not there, once it has been turned into text.
MISSING = frozenset({"nan", "NaN", "<NA>", "None", "null", "inf", "-inf", "Infinity", "-Infinity"})
VERIFIED_COLUMNS = ("correctness_math_verify", "correctness_llama")  # one flag per generation


@dataclass(frozen=True)
class Columns:
    """The columns chosen for a file; a dot reaches into a nested one. None: not there and not needed."""

    problem: str
    answer: str | None
    trace: str | None

    @property
    def to_read(self) -> list[str]:
        """The top-level columns to ask a Parquet file for."""
        chosen = [name for name in (self.problem, self.answer, self.trace) if name]
        return [name.partition(".")[0] for name in chosen]


def choose_columns(
    path: Path, found: Sequence[str], config: DataConfig, *, need_answer: bool, need_trace: bool
) -> Columns:
    """Raises DataError, naming the columns found and the key to set, when a needed column is not there."""

    def choose(key: str, configured: str, known: Sequence[str], needed: bool) -> str | None:
        candidates = known if configured == "auto" else (configured,)
        for name in candidates:
            if name in found or name.partition(".")[0] in found:
                return name
        if not needed:
            return None
        raise DataError(
            f"{path}: no column {' | '.join(candidates)} among those found ({', '.join(found)}); set data.{key}_column"
        )

    problem = choose("problem", config.problem_column, PROBLEM_COLUMNS, needed=True)
    assert problem is not None
    answer = choose("answer", config.answer_column, ANSWER_COLUMNS, need_answer)
    trace = choose("trace", config.trace_column, TRACE_COLUMNS, need_trace) if need_trace else None
    return Columns(problem, answer, trace)


def verified_columns(found: Sequence[str]) -> list[str]:
    """The columns of `found` that say which generations are right."""
    return [name for name in VERIFIED_COLUMNS if name in found]


def read_problem(row: Row, columns: Columns) -> str | None:
    """The problem's text: a string, or the last user message of a conversation. None when there is none."""
    value = _lookup(row, columns.problem)
    return _text(_last_message(value, "user") if isinstance(value, list) else value)


def read_answer(row: Row, columns: Columns) -> str | None:
    """The gold answer as text, or None when it is missing, blank or a number that is not finite."""
    value = _lookup(row, columns.answer) if columns.answer else None
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        value = _digits(value)
    text = _text(value)
    return text.strip() if text and text.strip() not in MISSING else None


def _digits(number: int | float | Decimal) -> str | None:
    """Its digits without an exponent ("0.00001", not "1e-05", whose e reads as Euler's number); None if not finite."""
    decimal = Decimal(str(number))
    return f"{decimal:f}" if decimal.is_finite() else None


def read_trace(row: Row, columns: Columns) -> str | None:
    """A worked response: a string, the last assistant message, or the first generation flagged as right."""
    value = _lookup(row, columns.trace) if columns.trace else None
    if not isinstance(value, list):
        return _text(value)
    if value and isinstance(value[0], dict):
        return _text(_last_message(value, "assistant"))
    return _first_verified(row, value)


def _first_verified(row: Row, generations: list[Any]) -> str | None:
    verdicts = [row[name] for name in VERIFIED_COLUMNS if isinstance(row.get(name), list)]
    if not verdicts:
        return _text(generations[0]) if generations else None
    for flags in verdicts:
        for generation, is_right in zip(generations, flags, strict=False):
            if is_right and _text(generation):
                return _text(generation)
    return None


def _lookup(row: Row, name: str) -> Any:
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _last_message(messages: list[Any], role: str) -> Any:
    for message in reversed(messages):
        if isinstance(message, dict) and message.get("role") == role:
            return message.get("content")
    return None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value.strip() else None
