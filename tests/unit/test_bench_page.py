"""The page of a directory of results."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_opd.bench.page import write_page
from megatron_opd.bench.results import write_result
from megatron_opd.errors import DataError
from tests.graded import PROTOCOL, result_of, simulated


def test_the_page_says_what_was_measured_and_how(tmp_path: Path) -> None:
    aime = simulated(samples=32)
    gpqa = simulated("gpqa_diamond", 198, 4, options=4, groups=("physics", "biology"))
    write_result(tmp_path, result_of(aime, gpqa), [*aime, *gpqa])
    page = write_page(tmp_path).read_text(encoding="utf-8")
    for words in (
        "AIME24",
        "30 x 32",
        "95 %:",
        "math-verify",
        "abababab",
        "8,192 tokens",
        "seeds ± 2.6",  # 1.96 standard errors, as the interval beside it
        "Protocol official: 32 of every question, at temperature 0.6, top_p 0.95, at most 8,192 "
        "tokens. Graded by math (math-verify 0.9.0). Questions: data/aime24.jsonl.",
    ):
        assert words in page
    assert page.count("data:image/png") == 1 + 2 + 3
    assert "http" not in page.replace('http-equiv="Content', "")
    assert "&lt;b&gt;then&lt;/b&gt;" in page and "<b>then</b>" not in page
    # 32 samples of 30 questions are what TrOPD took; 4 of 198 too
    assert "TrOPD-FKL" in page and "38.54" in page and 'class="apart"' not in page
    assert re.search(r"<td>[+-][0-9.]+</td><td>± [0-9.]+</td>", page)
    # GPQA's authors ask that its questions are not put online
    assert "Question aime24-" in page and "Question gpqa" not in page
    assert "no sample is shown here" in page
    assert re.search(r"By the letter of the right option.*moved", page, re.DOTALL)


def test_a_row_that_measures_something_else_has_no_difference(tmp_path: Path) -> None:
    """The result says nothing of its model and engine either."""
    samples = simulated(questions=9, samples=2)
    result = replace(result_of(samples, protocol=replace(PROTOCOL, samples=2)), model={}, engine={})
    write_result(tmp_path, result, samples)
    page = write_page(tmp_path).read_text(encoding="utf-8")
    assert page.count('class="apart"') == 4
    assert "30 x 32, ours 9 x 2" in page


def test_one_sample_of_a_question_has_no_picture_of_its_luck(tmp_path: Path) -> None:
    """It is right or wrong. Another number of questions than the published one is said."""
    samples = simulated("math_500", questions=9, samples=1)
    result = result_of(samples, protocol=replace(PROTOCOL, samples=1, temperature=0.0))
    suite = result.suites["math_500"]
    fewer = replace(suite, data={**suite.data, "questions": 9, "questions_expected": 500})
    write_result(tmp_path, replace(result, suites={"math_500": fewer}), samples)
    page = write_page(tmp_path).read_text(encoding="utf-8")
    assert page.count("data:image/png") == 1 + 1 and "sometimes" not in page
    assert "math_500: 9 questions, the published data have 500; compare its score with" in page
    assert "Protocol official: every question once, greedily, at most 8,192 tokens" in page


def test_a_directory_without_results_has_no_page(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a directory of results"):
        write_page(tmp_path)
