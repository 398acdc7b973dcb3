"""From graded samples to the summary of a suite, and to a directory of results and back."""

import json
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet
import pytest

from megatron_opd.bench.results import read_result, read_samples, write_result, write_samples
from megatron_opd.bench.summary import Place, Portion, summarise
from megatron_opd.errors import DataError
from tests.graded import graded, result_of, simulated


def test_a_summary_by_hand() -> None:
    """Three questions with two samples each."""
    summary = summarise(
        [
            graded("a", 0, tokens=10),
            graded("a", 1, tokens=20),
            graded("b", 0, tokens=30),
            graded("b", 1, tokens=40, reason="wrong", extracted="8"),
            graded("c", 0, tokens=50, reason="truncated", extracted="", truncated=True),
            graded("c", 1, tokens=90, reason="timeout", extracted="9"),
        ]
    )
    assert (summary.questions, summary.samples, summary.score) == (3, 2, 0.5)
    assert summary.low < 0.5 < summary.high
    assert summary.question_error == pytest.approx(0.5 / 3**0.5)
    assert summary.seed_error == pytest.approx((0.25 / 3 / 3) ** 0.5)
    assert summary.pass_at == pytest.approx({"1": 0.5, "2": 2 / 3})
    assert summary.majority == pytest.approx((1 + 0.5 + 0) / 3)
    assert (summary.truncated, summary.unanswered) == pytest.approx((1 / 6, 1 / 6))
    assert summary.reasons == {"correct": 3, "wrong": 1, "truncated": 1, "timeout": 1}
    assert (summary.timeouts, summary.bad_golds) == (1, 0)
    assert (summary.tokens.mean, summary.tokens.median) == (40, 35)
    assert (summary.tokens.right, summary.tokens.wrong) == (20, 60)
    assert (summary.options, summary.groups, summary.parts) == (None, {}, {})


def test_options_are_counted_by_their_place_and_voted_for_by_their_text() -> None:
    """Question a is right in both orders, b in none."""
    summary = summarise(
        [
            graded("a", 0, gold="A", extracted="A", order=(0, 1, 2), gold_place=0),
            graded("a", 1, gold="C", extracted="C", order=(1, 2, 0), gold_place=2),
            graded("b", 0, gold="B", extracted="A", order=(0, 1, 2), gold_place=1, reason="wrong"),
            graded("b", 1, gold="A", extracted="B", order=(1, 2, 0), gold_place=0, reason="wrong"),
        ]
    )
    assert summary.options is not None
    assert summary.options.places == {
        "A": Place(2, 0.5, 2), "B": Place(1, 0.0, 1), "C": Place(1, 1.0, 1),
    }  # fmt: skip
    assert (summary.options.unmoved, summary.options.moved) == (Portion(2, 0.5), Portion(2, 0.5))
    # "A" and "C" of question a are one option
    assert summary.majority == 0.5


def test_data_with_the_right_option_first_shows_no_memory_of_places() -> None:
    """GPQA's are so: what has not moved is A."""
    summary = summarise(
        [
            graded("a", gold="A", extracted="A", order=(0, 1), gold_place=0),
            graded("b", gold="B", extracted="B", order=(1, 0), gold_place=1),
        ]
    )
    assert summary.options is not None
    assert (summary.options.unmoved, summary.options.moved) == (None, None)


def test_a_place_that_is_preferred_shows() -> None:
    samples = simulated("gpqa_diamond", 100, 4, options=4)
    biased = [
        one if one.gold_place == 0 else replace(one, verdict=graded(reason="wrong").verdict)
        for one in samples
    ]
    first = summarise(samples).options
    second = summarise(biased).options
    assert first is not None and second is not None
    assert first.spread < 1.2 * first.chance_spread
    assert second.spread > 2 * second.chance_spread > 0
    assert sum(place.samples for place in first.places.values()) == 400


def test_groups_and_further_scores() -> None:
    """IFBench's four numbers, and two subjects."""
    names = ("prompt_strict", "instruction_strict", "prompt_loose", "instruction_loose")
    good = tuple((name, 1.0) for name in names)
    half = tuple(zip(names, (0.0, 0.5, 0.0, 1.0), strict=True))
    summary = summarise(
        [
            graded("a", group="maths", parts=good, gold="", extracted="a program"),
            graded("b", group="words", parts=half, gold="", extracted="", reason="wrong"),
            graded("c", group="words", gold="", extracted="", reason="truncated"),
        ]
    )
    means = (1 / 3, 1 / 2, 1 / 3, 2 / 3)  # c is not left out: it has followed nothing
    assert summary.parts == pytest.approx(dict(zip(names, means, strict=True)))
    assert {name: group.score for name, group in summary.groups.items()} == {"maths": 1, "words": 0}
    assert summary.groups["words"].questions == 2
    assert summary.groups["words"].high > 0.5
    assert summary.majority is None  # programs do not vote
    assert summary.seed_error is None


def test_gold_answers_that_nothing_compares_with_are_counted_by_question() -> None:
    samples = [graded("a", number, reason="bad_gold") for number in range(2)]
    summary = summarise([*samples, graded("b", 0), graded("b", 1)])
    assert (summary.bad_golds, summary.score) == (1, 0.5)


@pytest.mark.parametrize(
    ("samples", "problem"),
    [
        ([], "no graded samples"),
        ([graded("a", 0), graded("a", 1), graded("b", 0)], "aime24: question b has 1 samples, oth"),
        ([graded("a", 0), graded("a", 0)], "a sample is there twice"),
    ],
)
def test_half_a_suite_has_no_summary(samples: list, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        summarise(samples)


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    samples = simulated(groups=("algebra", "geometry")) + simulated("arc_c", 9, 4, options=4)
    samples[3] = replace(
        samples[3], text="half \ud83d of a character", verdict=graded(reason="error").verdict
    )
    result = result_of(samples[:120], samples[120:])
    write_result(tmp_path / "new" / "out", result, samples)
    again = read_result(tmp_path / "new" / "out")
    assert again == result
    read = read_samples(tmp_path / "new" / "out", again)
    assert read[3] == replace(samples[3], text="half ? of a character")
    assert read[:3] + read[4:] == samples[:3] + samples[4:]
    columns = pyarrow.parquet.read_schema(tmp_path / "new" / "out" / "samples.parquet").names
    assert columns[:4] == ["suite", "key", "group", "sample"] and "reason" in columns
    assert not list(tmp_path.rglob("*.tmp"))


def edit(directory: Path, **changes: object) -> None:
    path = directory / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_is_not_a_result_is_refused_in_one_line(tmp_path: Path) -> None:
    samples = simulated(questions=3)
    write_result(tmp_path, result_of(samples), samples)
    with pytest.raises(DataError, match=r"elsewhere: not a directory of results \(no results.json"):
        read_result(tmp_path / "elsewhere")
    write_samples(tmp_path / "samples.parquet", samples[:-1])
    with pytest.raises(DataError, match=r"has 11 samples of aime24, results.json has 12"):
        read_samples(tmp_path, read_result(tmp_path))
    write_samples(tmp_path / "samples.parquet", [*samples, graded(suite="amc23")])
    with pytest.raises(DataError, match=r"has 1 samples of amc23, results.json has 0"):
        read_samples(tmp_path, read_result(tmp_path))
    pyarrow.parquet.write_table(pyarrow.table({"a": [1]}), tmp_path / "samples.parquet")
    with pytest.raises(DataError, match=r"samples.parquet: not the samples of a benchmark"):
        read_samples(tmp_path, read_result(tmp_path))
    (tmp_path / "samples.parquet").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"samples.parquet: not the samples of a benchmark"):
        read_samples(tmp_path, read_result(tmp_path))
    (tmp_path / "samples.parquet").unlink()
    with pytest.raises(DataError, match=r"samples.parquet: is missing"):
        read_samples(tmp_path, read_result(tmp_path))
    edit(tmp_path, suites={"aime24": {"title": 3}})
    with pytest.raises(DataError, match=r"results.json: suites.aime24.protocol: missing"):
        read_result(tmp_path)
    edit(tmp_path, format=2, news=1)
    with pytest.raises(DataError, match="has format 2, this version reads up to 1"):
        read_result(tmp_path)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(DataError, match=r"results.json: not valid JSON"):
        read_result(tmp_path)
