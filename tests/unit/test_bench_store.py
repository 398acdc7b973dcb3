"""The directory of an evaluation: lines of several processes, torn lines, another request."""

from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from megatron_opd.bench.grading import Grading
from megatron_opd.bench.store import Store, alone_in, check_request
from megatron_opd.contracts.rows import Task, Verdict
from megatron_opd.contracts.sampling import Request, Sampling
from megatron_opd.contracts.suites import Answer, Asked, Question
from megatron_opd.errors import ConfigError, RunError
from megatron_opd.evaluation.writers import Written
from megatron_opd.suites.asking import SuitePrompt


def prompt(key: str, sample: int = 0, suite: str = "sums") -> SuitePrompt:
    asked = Asked(Question(key, "1+1", "2"), sample, "1+1", "2")
    ids = np.array([3], np.int32)
    request = Request(Task(0, "1+1", "2", "1+1", ids), ids, 4, seed=1)
    return SuitePrompt(suite, asked, "1+1", request, Sampling(0, 1.0))


def test_lines_of_all_processes_are_read_and_a_torn_one_is_not(tmp_path: Path) -> None:
    with Store(tmp_path, 0) as first, Store(tmp_path, 1) as second:
        first.keep_completion(prompt("a"), Written("2 \u2028 \\boxed{2}\nend", 3, False))
        second.keep_completion(prompt("b", 1), Written("", 0, True))
        second.keep_verdict(("sums", "b", 1), Verdict(0.5, False, "partly", "1", (("x", 0.25),)))
    path = tmp_path / "completions.0.jsonl"
    path.write_bytes(path.read_bytes() + b'{"key": ["sums", "c", 0], "text": "\xc3')
    with Store(tmp_path, 0) as again:
        expected = {
            ("sums", "a", 0): Written("2 \u2028 \\boxed{2}\nend", 3, False),
            ("sums", "b", 1): Written("", 0, True),
        }
        assert again.completions() == expected
        again.keep_completion(prompt("c"), Written("2", 1, False))  # on a line of its own
        assert again.completions() == expected | {("sums", "c", 0): Written("2", 1, False)}
        assert again.verdicts() == {
            ("sums", "b", 1): Verdict(0.5, False, "partly", "1", (("x", 0.25),))
        }
        again.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_directory_is_of_one_request(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with alone_in(out):
        check_request(out, {"seed": 0, "suites": {"a": {"protocol": {"samples": 4}}}})
    assert [path.name for path in out.iterdir()] == ["request.json"]
    check_request(out, {"seed": 0, "suites": {"a": {"protocol": {"samples": 4}}}})
    with pytest.raises(ConfigError, match=r"another suites\.a\.protocol\.samples; give the same"):
        check_request(out, {"seed": 0, "suites": {"a": {"protocol": {"samples": 8}}}})
    with pytest.raises(ConfigError, match="another suites"):
        check_request(out, {"seed": 0, "suites": {"b": {}}})
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="holds other files"):
        check_request(tmp_path, {"seed": 0})
    with pytest.raises(ConfigError, match="is a file"):
        check_request(tmp_path / "file", {"seed": 0})


class Equal:
    """Judges by equality with the gold answer."""

    versions: ClassVar = {"equal": "1"}

    def __init__(self, fails: bool = False) -> None:
        self.calls: list[int] = []
        self._fails = fails

    def grade(self, answers: list[Answer]) -> list[Verdict]:
        self.calls.append(len(answers))
        if self._fails:
            raise RunError("no judge starts")
        rights = [answer.text == answer.asked.gold for answer in answers]
        return [Verdict(float(right), right, "correct" if right else "wrong") for right in rights]


def test_completions_go_to_the_graders_of_their_suites() -> None:
    graders = {"sums": Equal(), "words": Equal()}
    kept = {}
    with Grading(graders, lambda key, verdict: kept.update({key: verdict.score})) as grading:
        for number in range(600):
            suite = "sums" if number % 3 else "words"
            written = Written("2" if number % 2 else "3", 1, False)
            grading.give(prompt(str(number), suite=suite), written)
    assert len(kept) == 600 and sum(kept.values()) == 300
    assert sum(graders["words"].calls) == 200


def test_a_grader_that_fails_ends_the_evaluation() -> None:
    with (
        pytest.raises(RunError, match="no judge starts"),
        Grading({"sums": Equal(fails=True)}, lambda key, verdict: None) as grading,
    ):
        grading.give(prompt("a"), Written("2", 1, False))
