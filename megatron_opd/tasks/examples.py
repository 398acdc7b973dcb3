"""The examples of data files: the fields of a row, checked and not yet rendered."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path

from megatron_opd.files.rows import (
    BadRows,
    NumberedRow,
    Row,
    RowError,
    json_columns,
    parquet_columns,
    read_json,
    read_parquet,
)
from megatron_opd.recipe.data import DataConfig
from megatron_opd.tasks.fields import (
    Fields,
    choose_columns,
    read_answer,
    read_level,
    read_problem,
    read_source,
    read_trace,
    verified_columns,
)
from megatron_opd.tasks.messages import BadField, Problem

# The columns that `megatron-opd traces` writes: a trace's text, and its tokens.
TRACE_IDS_OF = "response"
TRACE_IDS_COLUMN = "token_ids"
# Together, the first rows of a JSON file are taken to have all its columns.
_ROWS_WITH_ALL_COLUMNS = 100


@dataclass(frozen=True)
class Example:
    """The fields of a row."""

    path: Path
    number: int  # from 1, in its file
    index: int  # from 0, over all files
    problem: Problem
    answer: str
    trace: str | None
    trace_ids: object  # the trace's own tokens, from a file of `megatron-opd traces`
    source: str = ""
    columns: Row = field(default_factory=dict)  # all of them, where a reward reads them
    level: float = 0.0

    def error(self, problem: str) -> RowError:
        """The error of this row."""
        return RowError(self.path, self.number, problem)


def read_examples(
    files: Sequence[Path],
    config: DataConfig,
    key: str,
    bad_rows: BadRows,
    *,
    need_answer: bool,
    need_trace: bool,
    need_columns: bool = False,
) -> Iterator[Example]:
    """The examples of the files, in order; rows that cannot be read go to `bad_rows`.

    With `need_columns` they have all columns of their rows.
    """
    before = 0  # rows of the files ahead
    for path in files:
        last = 0
        columns, names, rows = _open(
            path,
            config,
            key,
            need_answer=need_answer,
            need_trace=need_trace,
            need_columns=need_columns,
        )
        own_tokens = columns.trace == TRACE_IDS_OF and TRACE_IDS_COLUMN in names
        for number, row in rows:
            last = number
            try:
                if isinstance(row, RowError):
                    raise row
                trace_ids = row.get(TRACE_IDS_COLUMN, ()) if own_tokens else None
                fields = _read_fields(row, columns, need_answer=need_answer, need_trace=need_trace)
                source = read_source(row, columns)
                level = read_level(row, columns)
                kept = row if need_columns else {}
                yield Example(
                    path, number, before + number - 1, *fields, trace_ids, source, kept, level
                )
            except RowError as error:
                bad_rows.add(error)
            except BadField as error:
                bad_rows.add(RowError(path, number, str(error)))
        before += last


def _open(
    path: Path,
    config: DataConfig,
    key: str,
    *,
    need_answer: bool,
    need_trace: bool,
    need_columns: bool,
) -> tuple[Fields, list[str], Iterator[NumberedRow]]:
    """The columns to read of a file, the names of all its columns, and its rows."""
    choose = partial(choose_columns, need_answer=need_answer, need_trace=need_trace)
    if path.suffix == ".parquet":
        names = parquet_columns(path)
        columns = choose(path, names, config, key)
        has_own_tokens = columns.trace == TRACE_IDS_OF and TRACE_IDS_COLUMN in names
        further = [TRACE_IDS_COLUMN] if has_own_tokens else []
        further += verified_columns(names) if need_trace else []
        read = [*columns.to_read(names), *further]
        if need_columns:
            read = [
                name for name in names if name.partition(".")[0] not in names or "." not in name
            ]
        return columns, names, read_parquet(path, read)
    rows = read_json(path)
    first = list(islice(rows, _ROWS_WITH_ALL_COLUMNS))
    names = json_columns(path, first)
    return choose(path, names, config, key), names, chain(first, rows)


def _read_fields(
    row: Row, columns: Fields, *, need_answer: bool, need_trace: bool
) -> tuple[Problem, str, str | None]:
    """Problem, answer and trace. Raises BadField."""
    problem = read_problem(row, columns)
    answer = read_answer(row, columns)
    trace = read_trace(row, columns)
    if need_answer and answer is None:
        raise BadField(f"no answer in column {columns.answer}; fill it or remove the row")
    if need_trace and trace is None:
        raise BadField(f"no (verified) trace in column {columns.trace}; fill it or remove the row")
    texts = [problem.text, answer, trace, *(message["content"] for message in problem.before)]
    for text in texts:
        if isinstance(text, str):
            _check_characters(text)
    return problem, answer or "", trace


def _check_characters(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise BadField(
            f"{half} is half a character (a lone surrogate); mend it or remove the row"
        ) from None
    if "\0" in text:
        raise BadField("a NUL character in the text; mend it or remove the row")
