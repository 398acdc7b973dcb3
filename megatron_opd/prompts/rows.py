"""Rows of a JSONL or Parquet file."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_opd.errors import DataError

Row = dict[str, Any]


class RowError(DataError):
    """A row of a data file is wrong."""

    def __init__(self, path: Path, number: int, what: str) -> None:
        super().__init__(f"{path}:{number}: {what}")


def column_names(path: Path) -> list[str]:
    """The columns of a data file: a Parquet schema, or the keys of the first JSONL row.

    Raises DataError when the file is missing, empty, unreadable or of another kind.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; check data.train and data.heldout")
    if path.suffix == ".parquet":
        return list(_open_parquet(path).schema_arrow.names)
    if path.suffix != ".jsonl":
        raise DataError(f"{path}: unknown kind of file '{path.suffix}'; give a .jsonl or a .parquet file")
    for _, row in read_rows(path):
        return list(row)
    raise DataError(f"{path}: the file has no rows; give it at least one")


def read_rows(path: Path, columns: list[str] | None = None) -> Iterator[tuple[int, Row]]:
    """Yield (row number from 1, row). JSONL counts lines, blank ones too, so that an editor finds the row.

    columns: what Parquet reads; JSONL rows are whole.
    """
    if path.suffix == ".parquet":
        number = 0
        for batch in _open_parquet(path).iter_batches(columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield number, row
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, _parse_json(path, number, line)


def _parse_json(path: Path, number: int, line: bytes) -> Row:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise RowError(path, number, f"not valid JSON ({error}); every line must be one JSON object") from error
    if not isinstance(row, dict):
        raise RowError(path, number, f"a JSON {type(row).__name__}; every line must be one JSON object")
    return row


def _open_parquet(path: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a Parquet file ({str(error).splitlines()[0]}); write it again") from error
    if file.metadata.num_rows == 0:
        raise DataError(f"{path}: the file has no rows; give it at least one")
    return file
