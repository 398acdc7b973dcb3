"""Two directories of results compared, what is refused, and samples graded anew."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from megatron_opd.bench.compare import as_json, compare_results
from megatron_opd.bench.regrade import regrade
from megatron_opd.bench.results import Result, write_result
from megatron_opd.bench.table import print_comparison, print_result
from megatron_opd.contracts.rows import Verdict
from megatron_opd.contracts.suites import Answer, GradedSample, Question
from megatron_opd.errors import DataError
from tests.graded import PROTOCOL, graded, result_of, simulated


def written(directory: Path, *suites: list[GradedSample], result: Result | None = None) -> Path:
    samples = [one for suite in suites for one in suite]
    write_result(directory, result or result_of(*suites), samples)
    return directory


def test_a_better_model_is_told_from_an_equal_one(tmp_path: Path) -> None:
    """AIME24 is better, GPQA is the same model with other seeds; the order of rows is another."""
    first = written(tmp_path / "a", simulated(), simulated("gpqa_diamond", 60, options=4))
    better = simulated(seed=1, better=0.4)[::-1]
    second = written(tmp_path / "b", better, simulated("gpqa_diamond", 60, seed=1, options=4))
    compared = compare_results(first, second)
    aime, gpqa = compared.suites
    assert (aime.suite, aime.questions, aime.samples) == ("aime24", 30, 4)
    assert aime.difference.mean == pytest.approx(aime.second - aime.first)
    assert aime.difference.low > 0.05 and aime.corrected_p < 0.01
    assert aime.corrected_p == pytest.approx(2 * aime.difference.p)
    assert gpqa.difference.low < 0 < gpqa.difference.high and gpqa.corrected_p > 0.05
    assert "the second is better by" in aime.sentence
    assert "do not tell the two apart; this suite shows differences from" in gpqa.sentence
    assert gpqa.sentence.endswith("smaller ones need more than 4 samples of every question")
    back = compare_results(second, first).suites[0]
    assert back.difference.mean == pytest.approx(-aime.difference.mean)
    assert "the second is worse by" in back.sentence
    assert json.loads(as_json(compared))["suites"][0]["difference"]["test"] == "sign flips"


def test_one_result_against_itself_says_so(tmp_path: Path) -> None:
    first = written(tmp_path / "a", simulated(), simulated("arc_c", 20, 1, options=4))
    for suite in compare_results(first, first).suites:
        assert suite.difference.mean == 0 and suite.difference.low < 0 < suite.difference.high
        assert suite.sentence.endswith("are they one model with one seed?")


def test_tables_on_a_terminal_and_in_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = simulated()
    first = written(tmp_path / "a", samples)
    second = written(tmp_path / "b", simulated(seed=1), simulated("amc23", 5))
    compared = compare_results(first, second)
    print_comparison(compared)
    printed = capsys.readouterr().out
    assert "aime24 | 30 x 4 |" in printed and "only one of the two has amc23" in printed
    console = Console(width=160, record=True, quiet=True)
    print_comparison(compared, console)
    print_result(result_of(samples), console)
    print_result(result_of(samples))
    printed = capsys.readouterr().out
    assert "avg@k" in printed and "were cut at 8,192 tokens" in printed
    broken = [graded("a"), graded("b", reason="error"), graded("c", reason="bad_gold")]
    print_result(result_of([*broken, graded("d", reason="timeout")]))
    printed = capsys.readouterr().out
    assert "aime24: the grader failed on 1 of 4; they score 0" in printed
    assert "the grading of 1 of 4 was stopped" in printed
    assert "1 gold answers cannot be compared with" in printed


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda suite: replace(suite, protocol=replace(PROTOCOL, temperature=1.0)),
         "aime24 was asked with temperature 1.0, the first with 0.6; run both with one protocol"),
        (lambda suite: replace(suite, data={"sha256": {"aime24.jsonl": "cd" * 32}}),
         "aime24 is of other data (sha256 cdcdcdcdcdcd, the first has abababababab)"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused(tmp_path: Path, change: object, problem: str) -> None:
    samples = simulated(questions=5)
    result = result_of(samples)
    first = written(tmp_path / "a", samples)
    other = replace(result, suites={"aime24": change(result.suites["aime24"])})  # type: ignore[operator]
    second = written(tmp_path / "b", samples, result=other)
    with pytest.raises(DataError) as error:
        compare_results(first, second)
    assert problem in str(error.value)
    assert str(second) in str(error.value) and "\n" not in str(error.value)


def test_other_questions_and_other_suites_are_refused(tmp_path: Path) -> None:
    first = written(tmp_path / "a", simulated(questions=5))
    renamed = [replace(one, key=one.key.replace("4-004", "4-9")) for one in simulated(questions=5)]
    with pytest.raises(DataError, match="2 questions of aime24 are in one of the two samp"):
        compare_results(first, written(tmp_path / "b", renamed))
    with pytest.raises(DataError, match=r"has no suite of .*; they have aime24 and amc23"):
        compare_results(first, written(tmp_path / "c", simulated("amc23", 5)))
    with pytest.raises(DataError, match="not a directory of results"):
        compare_results(first, tmp_path)


def test_other_graders_are_noted(tmp_path: Path) -> None:
    samples = simulated(questions=5)
    result = result_of(samples)
    newer = replace(result.suites["aime24"].grader, versions={"math-verify": "1.0"})
    other = replace(result, suites={"aime24": replace(result.suites["aime24"], grader=newer)})
    first = written(tmp_path / "a", samples)
    compared = compare_results(first, written(tmp_path / "b", samples, result=other))
    assert compared.notes == [
        "aime24: graded by math-verify 0.9.0 and math-verify 1.0; `bench regrade` grades both alike"
    ]


def test_another_order_of_options_is_noted(tmp_path: Path) -> None:
    samples = simulated("arc_c", 5, options=4)
    turned = [replace(one, order=one.order[::-1]) for one in samples]
    first = written(tmp_path / "a", samples)
    compared = compare_results(first, written(tmp_path / "b", turned))
    assert "arc_c: 20 samples saw their options in another order" in compared.notes[0]


class ByGold:
    """Right where the text names the gold answer."""

    def __init__(self) -> None:
        self.versions = {"by-gold": "1"}
        self.opened: list[bool] = []

    def grade(self, answers: Sequence[Answer]) -> list[Verdict]:
        self.opened += [answer.opened for answer in answers]
        right = [answer.asked.gold in answer.text for answer in answers]
        names = {True: "correct", False: "wrong"}
        return [Verdict(float(one), one, names[one], "7") for one in right]


def test_samples_are_graded_anew_with_the_gold_they_were_asked_with() -> None:
    samples = [graded("a"), graded("a", 1, reason="wrong"), graded("b", gold="8", reason="wrong")]
    questions = {key: Question(key, "?", "another gold") for key in "ab"}
    again, changed = regrade(samples, questions, ByGold())
    assert [one.verdict.correct for one in again] == [True, True, False]
    assert [(one.before.key, one.before.sample) for one in changed] == [("a", 1)]
    assert again[0] == samples[0]
    grader = ByGold()
    regrade([replace(samples[0], prompt="Why? <think>\n"), samples[2]], questions, grader)
    assert grader.opened == [True, False]
    with pytest.raises(DataError, match="question b of the samples is not in the data"):
        regrade(samples, {"a": questions["a"]}, ByGold())
