"""The questions of a suite, from the rows of its data."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_opd.contracts.suites import Question
from megatron_opd.errors import DataError
from megatron_opd.files.rows import RowError
from megatron_opd.suites.forms import FORMS, BadRow, digest
from megatron_opd.suites.sources import DataFile, columns_of, find_files, read_rows, value_of
from megatron_opd.suites.suite import Suite

logger = logging.getLogger(__name__)

Warn = Callable[[str], None]
_SHOWN_COLUMNS = 20


@dataclass(frozen=True)
class SuiteData:
    """A suite's questions, and what is recorded of where they are from."""

    questions: list[Question]
    provenance: dict[str, object]


def read_questions(suite: Suite, given: str | None, warn: Warn = logger.warning) -> SuiteData:
    """The questions of a suite, of the data `given` (a path or a Hub id) or its own.

    Another number of questions than the suite expects is a warning. Raises DataError, in one line,
    for missing files, wrong columns and rows that make no question.
    """
    files = find_files(suite, given)
    columns = [_chosen_columns(suite, file) for file in files.files]
    counts: Counter[str] = Counter()
    questions = []
    for file, chosen in zip(files.files, columns, strict=True):
        questions += list(_questions(suite, file, chosen, counts))
    if not questions:
        only = f" with {suite.only}" if suite.only else ""
        raise DataError(f"{files.files[0].path}: has no question of {suite.name}{only}")
    kept = _named(_without_repetitions(suite, questions, warn))
    if suite.questions is not None and suite.questions != len(kept):
        warn(
            f"{suite.name}: {len(kept):,} questions, where {suite.questions:,} are expected; "
            "compare its result with none of another number"
        )
    provenance = {
        **files.origin,
        "rows_read": counts["rows"],
        "filter": str(suite.only) if suite.only else "",
        "questions": len(kept),
        "questions_expected": suite.questions,
    }
    return SuiteData(kept, provenance)


def _chosen_columns(suite: Suite, file: DataFile) -> dict[str, str]:
    """The column of every field that the file has. Raises DataError naming those that it lacks."""
    form = FORMS[suite.form]
    there = columns_of(file)
    by_lower = {name.lower(): name for name in reversed(there)}
    chosen = {}
    for field, names in {**form.columns, **(form.more or {})}.items():
        wanted = (suite.columns[field],) if field in suite.columns else names
        present = [by_lower[name.lower()] for name in wanted if name.lower() in by_lower]
        if present:
            chosen[field] = present[0]
        elif field in form.columns or field in suite.columns:
            raise _lacks(suite, file, " | ".join(wanted), there)
    only = suite.only
    if only and only.column in there:
        chosen[""] = only.column
    elif only and not only.optional:
        raise _lacks(suite, file, only.column, there)
    return chosen


def _lacks(suite: Suite, file: DataFile, wanted: str, there: Sequence[str]) -> DataError:
    names = [name if name.isprintable() else ascii(name) for name in there]
    more = f" and {len(names) - _SHOWN_COLUMNS} more" if len(names) > _SHOWN_COLUMNS else ""
    return DataError(
        f"{file.path}: {suite.name} wants a column {wanted}; there are "
        f"{', '.join(names[:_SHOWN_COLUMNS])}{more}"
    )


def _questions(
    suite: Suite, file: DataFile, columns: Mapping[str, str], counts: Counter[str]
) -> Iterator[Question]:
    form = FORMS[suite.form]
    only = suite.only if "" in columns else None
    top = {name for column in columns.values() for name in (column, column.split(".")[0])}
    for number, row in read_rows(file, sorted(top)):
        if isinstance(row, RowError):
            raise row
        counts["rows"] += 1
        if only and not only.keeps(value_of(row, only.column)):
            continue
        values = {field: value_of(row, column) for field, column in columns.items() if field}
        if suite.form == "redux" and "group" not in values:
            values["group"] = _subject(file.name)
        try:
            yield form.question(values)
        except BadRow as error:
            raise RowError(file.path, number, f"{error}; correct the row") from None


def _subject(name: str) -> str:
    """The subject of a file that lies in a folder per subject, such as `anatomy/test/0.parquet`."""
    folders = [part for part in Path(name).parts[:-1] if part not in ("data", "test")]
    return folders[-1] if folders else ""


def _without_repetitions(suite: Suite, questions: list[Question], warn: Warn) -> list[Question]:
    """Every question once, where all are there equally often: some files repeat their rows in the
    place of several samples."""
    times = Counter(_words(question) for question in questions)
    repeats = set(times.values())
    if len(repeats) > 1 or repeats == {1}:
        return questions
    warn(
        f"{suite.name}: every question is there {min(repeats)} times; it is taken once, and "
        "sampled as often as the protocol says"
    )
    return list({_words(question): question for question in questions}.values())


def _named(questions: list[Question]) -> list[Question]:
    """The questions with keys of their own: digests where the data's ids are not."""
    if len({question.key for question in questions}) == len(questions):
        return questions
    seen: Counter[str] = Counter()
    named = []
    for question in questions:
        key = digest(*_words(question))
        seen[key] += 1  # of equal questions it does not matter which is which
        named.append(replace(question, key=key if seen[key] == 1 else f"{key}-{seen[key]}"))
    return named


def _words(question: Question) -> tuple[str, ...]:
    return (question.text, *question.options)
