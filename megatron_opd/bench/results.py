"""The directory of a benchmark's results: `results.json`, and `samples.parquet` beside it."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_opd.bench.summary import SuiteSummary
from megatron_opd.contracts.rows import Verdict
from megatron_opd.contracts.suites import GradedSample, SuiteProtocol
from megatron_opd.errors import DataError
from megatron_opd.files.atomic import write_atomically
from megatron_opd.files.json_file import read_json
from megatron_opd.files.typed import InvalidKey, build

FORMAT = 1
RESULTS = "results.json"
SAMPLES = "samples.parquet"


@dataclass(frozen=True)
class GraderUsed:
    """What judged."""

    name: str
    versions: dict[str, str] = field(default_factory=dict)  # by package


@dataclass(frozen=True)
class Overlap:
    """How many questions occur in the recipe's training problems."""

    problems: int  # training problems compared
    exact: int  # questions whose words are those of a problem
    overlapping: int  # that share 13 words in a row with one, exact ones too


@dataclass(frozen=True)
class SuiteResult:
    """One suite's result."""

    title: str
    protocol: SuiteProtocol
    data: dict[str, object]  # where its questions are from: path or hub id, revision, sha256, rows
    grader: GraderUsed
    summary: SuiteSummary
    overlap: Overlap | None = None  # None where no training data were given


@dataclass(frozen=True)
class Result:
    """All that one model came to."""

    megatron_opd: str  # the version that made it
    model: dict[str, object]
    engine: dict[str, object]
    suites: dict[str, SuiteResult]
    format: int = FORMAT


def write_result(directory: Path, result: Result, samples: Sequence[GradedSample]) -> None:
    """Writes both files, the samples first. Raises DataError where they cannot be written."""
    values = {"format": result.format, **asdict(result)}  # the format first
    text = json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_samples(directory / SAMPLES, samples)
        write_atomically(directory / RESULTS, (text + "\n").encode("utf-8", "replace"))
    except OSError as error:
        raise DataError(
            f"{directory}: cannot write results here ({error.strerror}); make it writable"
        ) from None


def read_result(directory: Path) -> Result:
    """Raises DataError, which names the file and its key, for what `write_result` did not write."""
    path = directory / RESULTS
    try:
        values = read_json(path)
    except FileNotFoundError:
        raise DataError(
            f"{directory}: not a directory of results (no {RESULTS}); name one that bench wrote"
        ) from None
    version = values.get("format")
    if isinstance(version, int) and version > FORMAT:
        raise DataError(
            f"{path}: has format {version}, this version reads up to {FORMAT}; update megatron-opd"
        )
    try:
        result: Result = build(Result, values)
    except InvalidKey as error:
        raise DataError(
            f"{path}: {error.path}: {error.problem}; name a directory that bench wrote"
        ) from None
    return result


def read_samples(directory: Path, result: Result) -> list[GradedSample]:
    """The samples of a directory. Raises DataError where they are not those of its result."""
    path = directory / SAMPLES
    samples = _read_samples(path)
    counts = {name: 0 for name in result.suites}
    for one in samples:
        counts[one.suite] = counts.get(one.suite, 0) + 1
    for name, count in counts.items():
        suite = result.suites.get(name)
        expected = suite.summary.questions * suite.summary.samples if suite else 0
        if count != expected:
            raise DataError(
                f"{path}: has {count:,} samples of {name}, {RESULTS} has {expected:,}; "
                "the two files are not of one run"
            )
    return samples


def read_samples_by_suite(directory: Path, result: Result) -> dict[str, list[GradedSample]]:
    """The samples of every suite of a result, by its name. Raises as `read_samples` does."""
    samples: dict[str, list[GradedSample]] = {name: [] for name in result.suites}
    for one in read_samples(directory, result):
        samples[one.suite].append(one)
    return samples


# ------------------------------------------------------------------------------------------ parquet
def write_samples(path: Path, samples: Sequence[GradedSample]) -> None:
    """One row for every sample: its fields, with those of its verdict beside them."""
    import pyarrow
    import pyarrow.parquet

    rows = [_row(one) for one in samples]
    table = pyarrow.Table.from_pylist(rows, schema=pyarrow.schema(_columns()))
    temporary = path.with_name(path.name + ".tmp")
    pyarrow.parquet.write_table(table, temporary, compression="zstd")
    temporary.replace(path)


def _columns() -> list[tuple[str, Any]]:
    import pyarrow

    text = pyarrow.large_string()
    part = pyarrow.struct([("name", pyarrow.string()), ("value", pyarrow.float64())])
    return [
        ("suite", text), ("key", text), ("group", text), ("sample", pyarrow.int32()),
        ("gold", text), ("order", pyarrow.list_(pyarrow.int32())),
        ("gold_place", pyarrow.int32()), ("prompt", text), ("text", text),
        ("tokens", pyarrow.int32()), ("truncated", pyarrow.bool_()),
        ("score", pyarrow.float64()), ("correct", pyarrow.bool_()), ("reason", text),
        ("extracted", text), ("parts", pyarrow.list_(part)),
    ]  # fmt: skip


def _row(one: GradedSample) -> dict[str, Any]:
    row = {name: getattr(one, name) for name in GradedSample.__dataclass_fields__}
    del row["verdict"]
    row |= {name: getattr(one.verdict, name) for name in Verdict.__dataclass_fields__}
    row["order"] = list(one.order)
    row["parts"] = [{"name": name, "value": value} for name, value in one.verdict.parts]
    # halves of characters, which a file cannot hold
    return {name: _whole(value) if isinstance(value, str) else value for name, value in row.items()}


def _whole(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")


def _read_samples(path: Path) -> list[GradedSample]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
        rows = table.cast(pyarrow.schema(_columns())).to_pylist()
    except FileNotFoundError:
        raise DataError(f"{path}: is missing; name a directory that bench wrote") from None
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        cause = str(error).splitlines()[0]
        raise DataError(f"{path}: not the samples of a benchmark ({cause}); run it again") from None
    return [_sample(row) for row in rows]


def _sample(row: dict[str, Any]) -> GradedSample:
    verdict = {name: row.pop(name) for name in Verdict.__dataclass_fields__}
    parts = tuple((part["name"], part["value"]) for part in verdict["parts"])
    verdict["parts"] = parts
    row["order"] = tuple(row["order"])
    return GradedSample(**row, verdict=Verdict(**verdict))
