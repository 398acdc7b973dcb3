"""The papers' printed scores (`papers.json`), and which of them stand beside a result."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from megatron_opd.files.json_file import read_json, read_key
from megatron_opd.files.typed import build

_PATH = Path(__file__).parent / "papers.json"


@dataclass(frozen=True)
class Paper:
    """A paper, and how its tables were measured as far as it is known."""

    title: str
    protocol: str  # the name of the suites' protocol that follows it
    note: str


@dataclass(frozen=True)
class PaperRow:
    """One printed number."""

    paper: str
    table: str  # its number; "" where we know no more than that it is one of the paper's
    model: str  # "" where we know no more than its method
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
