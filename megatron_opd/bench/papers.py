"""The papers' printed scores (`papers.json`), and which of them stand beside a result."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from megatron_opd.files.json_file import read_json, read_key
from megatron_opd.files.typed import build

_PATH = Path(__file__).parent / "papers.json"


@dataclass(frozen=True)
class Paper:
    """A paper's tables, and how they were measured as far as it is known."""

    title: str
    protocol: str  # the name of the suites' protocol that follows it
    note: str


@dataclass(frozen=True)
class PaperRow:
    """One printed number."""

    paper: str
    table: str  # its number; "" where we know no more than that it is one of the paper's
    model: str
    method: str
    suite: str
    score: str  # in percent, as printed
    questions: int
    samples: int  # of every question
    note: str = ""  # what is odd about it
    misfit: bool = False  # no count of questions * samples answers gives this number


@dataclass(frozen=True)
class Average:
    """A column of averages."""

    paper: str
    model: str
    of: str
    scores: dict[str, str]  # by method, in percent, as printed


@dataclass(frozen=True)
class Papers:
    """All that is packaged."""

    papers: dict[str, Paper]
    rows: tuple[PaperRow, ...]
    averages: tuple[Average, ...]

    def beside(
        self, suite: str, questions: int, samples: int
    ) -> tuple[list[PaperRow], list[PaperRow]]:
        """The rows of a suite that measure the same, questions and samples alike, and the
        others."""
        of_suite = [row for row in self.rows if row.suite == suite]
        same = [row for row in of_suite if (row.questions, row.samples) == (questions, samples)]
        return same, [row for row in of_suite if row not in same]


@cache
def read_papers() -> Papers:
    """Reads the packaged file."""
    values = read_json(_PATH)
    return Papers(
        read_key(values, "papers", dict[str, Paper], _PATH),
        tuple(build(PaperRow, row, f"rows.{index}") for index, row in enumerate(values["rows"])),
        tuple(build(Average, one, f"averages.{i}") for i, one in enumerate(values["averages"])),
    )


def fits(printed: str, questions: int, samples: int) -> bool:
    """True when some count of right answers, of questions * samples, is printed so: rounded, or
    with the digits behind cut off."""
    digits = len(printed.partition(".")[2])
    unit = 10**digits
    value = round(float(printed) * unit)
    total = questions * samples
    near = math.floor(float(printed) * total / 100)
    counts = range(max(near - 1, 0), min(near + 2, total) + 1)
    return any(_printed(count, total, unit, value) for count in counts)


def _printed(count: int, total: int, unit: int, value: int) -> bool:
    exact = 100 * unit * count  # over total
    return exact // total == value or (2 * exact + total) // (2 * total) == value


def denominators(printed: Sequence[str], questions: int, samples: Sequence[int]) -> list[int]:
    """The numbers of samples that all printed scores allow."""
    return [k for k in samples if all(fits(one, questions, k) for one in printed)]
