"""The task of `make demo-real`: questions with right answers, and none both learnt and asked."""

import json
from pathlib import Path

import pytest

from tools.demo_real import wilson
from tools.make_real_task import in_words, write_task


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zero"),
        (13, "thirteen"),
        (40, "forty"),
        (100, "one hundred"),
        (205, "two hundred and five"),
        (544, "five hundred and forty-four"),
        (999, "nine hundred and ninety-nine"),
    ],
)
def test_numbers_in_words(number: int, words: str) -> None:
    assert in_words(number) == words


def test_files_are_disjoint_and_a_seed_makes_others(tmp_path: Path) -> None:
    questions = {}
    for seed in (0, 1):
        write_task(tmp_path / str(seed), seed)
        for name in ("train", "heldout"):
            rows = [json.loads(line) for line in (tmp_path / str(seed) / f"{name}.jsonl").open()]
            questions[seed, name] = [row["problem"] for row in rows]
            assert all(row["response"] == f"\\boxed{{{row['answer']}}}" for row in rows)
    assert len({*questions[0, "train"], *questions[0, "heldout"]}) == 1200
    assert sum("in digits" in problem for problem in questions[0, "heldout"]) == 120
    assert set(questions[0, "heldout"]) != set(questions[1, "heldout"])


def test_interval_of_a_share() -> None:
    """Newcombe 1998, table I: 81 of 263 and 0 of 20, without correction."""
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0.0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
