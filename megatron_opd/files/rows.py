"""Rows of a JSON, JSONL, Parquet, CSV or Arrow file."""

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from megatron_opd.errors import DataError, first_line

Row = dict[str, Any]

_MAX_LINE = 2**26  # bytes
_BOM = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


class RowError(DataError):
    """A row of a data file is wrong."""

    def __init__(self, path: Path, number: int, problem: str) -> None:
        super().__init__(f"{path}:{number}: {problem}")


NumberedRow = tuple[int, Row | RowError]  # the number counts from 1


class BadRows:
    """The rows that cannot be used: by policy, the first is an error, or all are counted."""

    def __init__(self, policy: str) -> None:
        self._policy = policy
        self._first: RowError | None = None
        self.count = 0

    def add(self, error: RowError) -> None:
        """Counts a row, or raises its error if the policy is "error"."""
        if self._policy == "error":
            raise error
        self._first = self._first or error
        self.count += 1

    def warn(self, rows: int, warn: Callable[[str], None]) -> None:
        """Warns of the number of rows left out, of all `rows`, and of the first one."""
        if self.count:
            warn(f"data.bad_rows: left out {self.count} of {rows} rows; the first: {self._first}")

    def raise_first(self) -> None:
        """Raises the first row's error, if there is one: for a data set with no other row."""
        if self._first is not None:
            raise self._first


def read_json(path: Path, longest_line: int | None = None) -> Iterator[NumberedRow]:
    """The rows of a .jsonl or .json file, compressed or not; an error for one that is unreadable.

    Lines are counted, blank ones too, so that an editor finds the row. A .json has one array, or
    lines like a .jsonl, of at most `longest_line` bytes (64 MiB). Raises DataError when the file
    itself cannot be read, or is one array that is not valid JSON.
    """
    most = longest_line or _MAX_LINE
    with _open(path) as file:
        name = path.name.removesuffix(".gz")
        if name.endswith(".json") and _first_character(file) == b"[":
            yield from _array(path, file)
            return
        for number, line in enumerate(iter(lambda: file.readline(most + 1), b""), start=1):
            if len(line) > most:
                raise RowError(
                    path,
                    number,
                    f"a line of more than {most >> 20} MiB; put every row on its own",
                )
            if number == 1 and line.startswith(_UTF16):
                raise RowError(path, number, "text in UTF-16; save the file as UTF-8")
            if line.removeprefix(_BOM).strip():
                yield number, _parse_line(path, number, line)


def json_columns(path: Path, rows: Iterable[NumberedRow]) -> list[str]:
    """The columns of some first rows; a nested one is `outer.inner`.

    Raises DataError when there are no rows, and the first row's error when none can be read.
    """
    names: dict[str, None] = {}
    error = None
    for _, row in rows:
        if isinstance(row, RowError):
            error = error or row
            continue
        names |= dict.fromkeys(_nested_names(row))
    if not names and error:
        raise error
    if not names:
        raise DataError(f"{path}: the file has no rows; give it at least one")
    return list(names)


def parquet_columns(path: Path) -> list[str]:
    """The columns of a Parquet file; a nested one is `outer.inner`.

    Raises DataError when the file is unreadable, has no rows or two columns of one name.
    """
    schema = _open_parquet(path).schema_arrow
    twice = {name for name in schema.names if schema.names.count(name) > 1}
    if twice:
        raise DataError(f"{path}: two columns are named {min(twice)}; rename one")
    return [name for field in schema for name in _nested_fields(field, "")]


def read_parquet(path: Path, columns: list[str]) -> Iterator[NumberedRow]:
    """The rows of a Parquet file with these top-level columns; an error for one that is unreadable.

    Raises DataError when the file is damaged.
    """
    return _numbered(path, _parquet_batches(path, columns))


def read_csv(path: Path) -> Iterator[NumberedRow]:
    """The rows of a CSV file with a header, all values texts; an error for one that has more values
    than the header names.

    Raises DataError when the file cannot be read, is empty or names a column twice.
    """
    longest = csv.field_size_limit(_MAX_LINE)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            names = list(reader.fieldnames or ())
            if not names:
                raise DataError(f"{path}: the file has no rows; give it a header and one row")
            if twice := {name for name in names if names.count(name) > 1}:
                raise DataError(f"{path}: two columns are named {min(twice)}; rename one")
            for number, row in enumerate(reader, start=1):
                if None in row:
                    problem = "more values than the header has names; quote those with a comma"
                    yield number, RowError(path, number, problem)
                else:
                    yield number, row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({first_line(error)}); write it again") from error
    finally:
        csv.field_size_limit(longest)


def read_arrow(path: Path) -> Iterator[NumberedRow]:
    """The rows of an Arrow file, as Hugging Face's `datasets` saves them; see `read_parquet`."""
    return _numbered(path, _arrow_batches(path))


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    try:
        with cast(BinaryIO, gzip.open(path) if path.suffix == ".gz" else path.open("rb")) as file:
            yield file
    except (OSError, EOFError, zlib.error) as error:  # BadGzipFile is an OSError
        raise DataError(f"{path}: cannot be read ({first_line(error)}); write it again") from error


def _first_character(file: BinaryIO) -> bytes:
    """The first byte that is no white space. Leaves the file at its start."""
    first = file.read(2**16).removeprefix(_BOM).lstrip()[:1]
    file.seek(0)
    return first


def _array(path: Path, file: BinaryIO) -> Iterator[NumberedRow]:
    try:
        rows = json.loads(file.read().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: not valid JSON ({error}); it must be one array of objects"
        ) from error
    for number, row in enumerate(rows, start=1):
        yield number, row if isinstance(row, dict) else _no_object(path, number, row)


def _parse_line(path: Path, number: int, line: bytes) -> Row | RowError:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return RowError(
            path, number, f"not valid JSON ({error}); every line must be one JSON object"
        )
    return row if isinstance(row, dict) else _no_object(path, number, row)


def _no_object(path: Path, number: int, row: object) -> RowError:
    return RowError(path, number, f"a JSON {type(row).__name__}; every row must be one JSON object")


def _nested_names(row: Row, path: str = "") -> Iterator[str]:
    for name, value in row.items():
        yield f"{path}{name}"
        if isinstance(value, dict) and path.count(".") < 8:
            yield from _nested_names(value, f"{path}{name}.")


def _nested_fields(field: Any, path: str) -> Iterator[str]:
    import pyarrow

    yield f"{path}{field.name}"
    if pyarrow.types.is_struct(field.type):
        for inner in field.type:
            yield from _nested_fields(inner, f"{path}{field.name}.")


def _python_rows(path: Path, before: int, batch: Any) -> Iterator[Row | RowError]:
    try:
        yield from batch.to_pylist()
        return
    except (ValueError, OverflowError):  # text that is not UTF-8, times out of range
        pass
    for index in range(len(batch)):
        try:
            yield batch.slice(index, 1).to_pylist()[0]
        except (ValueError, OverflowError) as error:
            yield RowError(
                path, before + index + 1, f"cannot be read ({first_line(error)}); remove the row"
            )


def _numbered(path: Path, batches: Iterable[Any]) -> Iterator[NumberedRow]:
    """The rows of Arrow's batches. Raises DataError where one of them cannot be read."""
    import pyarrow

    number = 0
    try:
        for batch in batches:
            for row in _python_rows(path, number, batch):
                number += 1
                yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{path}: damaged after row {number} ({first_line(error)}); write it again"
        ) from error


def _parquet_batches(path: Path, columns: list[str]) -> Iterator[Any]:
    yield from _open_parquet(path).iter_batches(columns=columns)


def _arrow_batches(path: Path) -> Iterator[Any]:
    import pyarrow

    with pyarrow.memory_map(str(path)) as source:
        try:
            batches = iter(pyarrow.ipc.open_stream(source))
        except pyarrow.ArrowInvalid:
            file = pyarrow.ipc.open_file(source)
            batches = map(file.get_batch, range(file.num_record_batches))
        yield from batches


def _open_parquet(path: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{path}: not a Parquet file ({first_line(error)}); write it again"
        ) from error
    if file.metadata.num_rows == 0:
        raise DataError(f"{path}: the file has no rows; give it at least one")
    return file
