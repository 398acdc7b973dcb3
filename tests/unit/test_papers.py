"""The papers' numbers: their denominators, their averages, and what stands beside a result."""

import math
from collections.abc import Sequence
from statistics import mean

import pytest

from megatron_opd.bench.papers import PaperRow, read_papers
from megatron_opd.suites.protocols import protocol_of
from megatron_opd.suites.table import SUITES

ROWS = read_papers().rows


def named(row: PaperRow) -> str:
    return f"{row.paper}-{row.suite}-{row.score}"


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


@pytest.mark.parametrize("row", ROWS, ids=named)
def test_every_printed_score_is_a_count_of_its_questions_and_samples(row: PaperRow) -> None:
    assert fits(row.score, row.questions, row.samples) is not row.misfit


@pytest.mark.parametrize("row", [row for row in ROWS if not row.misfit], ids=named)
def test_our_suites_have_the_papers_questions_and_samples(row: PaperRow) -> None:
    """OlympiadBench alone differs: 674 questions, LUFFY's file has 675."""
    suite = SUITES[row.suite]
    protocol = protocol_of(suite, read_papers().papers[row.paper].protocol)
    assert suite.questions is not None
    assert fits(row.score, suite.questions, protocol.samples)
    assert protocol.samples == row.samples
    assert suite.questions == row.questions - (row.suite == "olympiad")


def scores(suite: str, paper: str = "tropd") -> list[str]:
    return [
        row.score for row in ROWS if (row.suite, row.paper) == (suite, paper) and not row.misfit
    ]


def test_the_digits_tell_how_many_samples_a_paper_took() -> None:
    """38.54 is 370 of 960, and no count of 30, 120 or 240."""
    assert denominators(scores("aime24"), 30, (1, 4, 8, 16, 32)) == [32]
    assert denominators(scores("amc23"), 40, (1, 8, 16, 32)) == [32]
    assert denominators(scores("amc23"), 83, (1, 4, 8, 16, 32)) == []  # 2022 and 2023 together
    assert 1 in denominators(scores("livecodebench_v6"), 175, (1,))
    for questions in (454, 279, 167, 131):  # other readings of "v6"
        assert denominators(scores("livecodebench_v6"), questions, (1,)) == []
    assert denominators(scores("gpqa_diamond"), 198, (1, 2, 4)) == [4]


@pytest.mark.parametrize(
    ("printed", "questions", "samples", "expected"),
    [
        ("38.54", 30, 32, True), ("38.54", 30, 8, False), ("100.00", 30, 1, True),
        ("0.00", 30, 1, True), ("33.33", 30, 1, True), ("33.34", 30, 1, False),
        ("66.67", 30, 1, True), ("66.66", 30, 1, True), ("58.86", 198, 4, False),
        ("3", 30, 1, True),
    ],
)  # fmt: skip
def test_a_number_fits_rounded_or_cut_off(
    printed: str, questions: int, samples: int, expected: bool
) -> None:
    assert fits(printed, questions, samples) is expected


def test_the_averages_are_those_of_the_rows() -> None:
    def row(method: str, paper: str, *tables: str) -> list[float]:
        return [
            float(one.score)
            for one in ROWS
            if (one.method, one.paper) == (method, paper) and (not tables or one.table in tables)
        ]

    assert mean(row("TGPO-annealing", "tgpo")) == pytest.approx(45.6, abs=0.05)
    assert mean(row("LUFFY", "tgpo")) == pytest.approx(44.4, abs=0.05)
    assert mean(row("TrOPD-FKL", "tropd", "3, 5, 6", "3, 6")) == pytest.approx(40.63, abs=0.01)
    math = [one for one in row("TrOPD-FKL", "tropd", "3, 5, 6", "5")]
    assert mean(math) == pytest.approx(49.85, abs=0.01)
    averages = {(one.paper, one.of): one.scores for one in read_papers().averages}
    assert averages["tropd", "AIME24, AIME25, AMC23"]["TrOPD"] == "49.85"


def test_only_rows_with_the_same_questions_and_samples_stand_beside_a_result() -> None:
    papers = read_papers()
    same, apart = papers.beside("aime24", 30, 32)
    assert {row.paper for row in same} == {"tgpo", "tropd"} and not apart
    same, apart = papers.beside("aime24", 30, 8)
    assert not same and len(apart) == 4
    assert papers.beside("own", 30, 32) == ([], [])
    assert {row.paper for row in papers.rows} == set(papers.papers)
