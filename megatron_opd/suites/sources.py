"""A suite's data: its files, their rows, and what is recorded of them."""

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from megatron_opd.errors import DataError
from megatron_opd.files.manifest import describe
from megatron_opd.files.rows import (
    NumberedRow,
    Row,
    json_columns,
    parquet_columns,
    read_arrow,
    read_csv,
    read_json,
    read_parquet,
)
from megatron_opd.suites.hub import KINDS, HubData, fetched, parse_id
from megatron_opd.suites.suite import Suite

# Descriptions that Hugging Face's `datasets` writes beside data.
_BESIDE = ("dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json")
_LONGEST_LINE = 2**30  # bytes: a problem's hidden tests are one value
# Together, the first rows of a file are taken to have all its columns.
_ROWS_WITH_ALL_COLUMNS = 100
_MOST_LISTED = 8


class DataFile(NamedTuple):
    """A file of a suite, and its name within the folder or data set."""

    name: str
    path: Path


class SuiteFiles(NamedTuple):
    """A suite's files, in order, and where they are from, for the results."""

    files: list[DataFile]
    origin: dict[str, object]


def find_files(suite: Suite, given: str | None) -> SuiteFiles:
    """The files of a suite in the file, folder or Hub data set `given`, or of its own data set.

    Raises DataError.
    """
    text = given or suite.hub
    path = Path(text)
    hub = parse_id(text)
    if hub is not None and not path.exists():
        return _of_hub(suite, hub)
    if path.is_file():
        files = [DataFile(path.name, path)]
    elif path.is_dir():
        inside = [file for file in sorted(path.rglob("*")) if file.is_file()]
        names = choose_files(suite, [str(file.relative_to(path)) for file in inside], text)
        files = [DataFile(name, path / name) for name in names]
    else:
        raise DataError(f"{suite.name}: {text}: no such file or folder; give {suite.own_data}")
    for file in files:
        if not file.name.endswith(KINDS):
            raise DataError(
                f"{file.path}: unknown kind of file '{file.path.suffix}'; give one of "
                f"{', '.join(KINDS)}"
            )
    return SuiteFiles(files, {"path": str(path.resolve()), "sha256": _hashes(files)})


def choose_files(suite: Suite, names: Sequence[str], where: str) -> list[str]:
    """The files of a folder that are the suite's: all that match its first pattern that any
    matches. Raises DataError where there are none, or two kinds of file."""
    data = [
        name
        for name in sorted(names)
        if name.endswith(KINDS) and Path(name).name not in _BESIDE
        # hidden files and folders, a download's own among them
        if not any(part.startswith(".") for part in Path(name).parts)
    ]
    for pattern in suite.patterns:
        chosen = [name for name in data if fnmatch.fnmatchcase(f"/{name}", pattern)]
        if chosen:
            break
    else:
        raise DataError(
            f"{suite.name}: {where}: has no file of a kind that is read ({', '.join(KINDS)})"
        )
    kinds = {kind for kind in KINDS if any(name.endswith(kind) for name in chosen)}
    if len(kinds) > 1:
        more = f" and {len(chosen) - _MOST_LISTED} more" if len(chosen) > _MOST_LISTED else ""
        raise DataError(
            f"{suite.name}: {where}: has files of several kinds "
            f"({', '.join(chosen[:_MOST_LISTED])}{more}); give one as {suite.own_data}"
        )
    return chosen


def read_rows(file: DataFile, columns: Sequence[str] | None = None) -> Iterator[NumberedRow]:
    """The rows of a data file, numbered from 1; of Parquet with these top-level columns alone."""
    match file.path.name.removesuffix(".gz").rpartition(".")[2]:
        case "parquet":
            names = parquet_columns(file.path)
            top = [name for name in names if "." not in name or name.split(".")[0] not in names]
            wanted = top if columns is None else [name for name in top if name in columns]
            return read_parquet(file.path, wanted)
        case "csv":
            return read_csv(file.path)
        case "arrow":
            return read_arrow(file.path)
        case _:
            return read_json(file.path, _LONGEST_LINE)


def columns_of(file: DataFile) -> list[str]:
    """The columns of a data file; a nested one is `outer.inner`. Raises DataError."""
    if file.path.name.endswith(".parquet"):
        return parquet_columns(file.path)
    rows = read_rows(file)
    return json_columns(file.path, islice(rows, _ROWS_WITH_ALL_COLUMNS))


def value_of(row: Row, column: str) -> object:
    """A row's value; a column with a dot may lie within another."""
    if column in row:
        return row[column]
    value: object = row
    for name in column.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _of_hub(suite: Suite, data: HubData) -> SuiteFiles:
    got = fetched(suite, data, lambda names: choose_files(suite, names, data.name))
    files = [DataFile(name, path) for name, path in sorted(got.files.items())]
    origin: dict[str, object] = {"hub": data.name, "revision": got.commit}
    return SuiteFiles(files, {**origin, "sha256": _hashes(files)})


def _hashes(files: Sequence[DataFile]) -> dict[str, str]:
    hashes = {}
    for file in files:
        try:
            hashes[file.name] = describe(file.path)["sha256"]
        except OSError as error:
            raise DataError(f"{file.path}: cannot be read ({error.strerror})") from None
    return hashes
