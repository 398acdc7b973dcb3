"""Right samples of a result as a file of traces."""

import json
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet
import pytest

from megatron_opd.bench.results import write_result
from megatron_opd.cli.main import main
from megatron_opd.suites.open import open_suites
from tests.graded import PROTOCOL, graded, result_of

# of every question: number of the sample, reason, tokens; the second sample of the first is cut off
SAMPLES = [
    [(0, "wrong", 5), (1, "correct", 8192), (2, "correct", 30), (3, "correct", 20)],
    [(0, "wrong", 5), (1, "no_answer", 5), (2, "wrong", 5), (3, "wrong", 5)],
    [(0, "correct", 9), (1, "correct", 9), (2, "correct", 12), (3, "wrong", 3)],
]
KEPT = {"first": [(0, 2), (2, 0)], "shortest": [(0, 3), (2, 0)]}
KEPT["all"] = [(0, 2), (0, 3), (2, 0), (2, 1), (2, 2)]


@pytest.fixture
def result(tmp_path: Path) -> Path:
    """A result of three questions that lie in a file."""
    data = tmp_path / "questions.jsonl"
    lines = [json.dumps({"problem": f"Add {n}.", "answer": str(n)}) for n in range(len(SAMPLES))]
    data.write_text("\n".join(lines) + "\n")
    [suite] = open_suites(["math_500"], data={"math_500": str(data)}, warn=lambda _: None)
    rows = []
    for question, samples in zip(suite.questions, SAMPLES, strict=True):
        for sample, reason, tokens in samples:
            made = graded(question.key, sample, reason=reason, suite=suite.name, tokens=tokens)
            gold = question.gold
            rows.append(replace(made, gold=gold, truncated=tokens == 8192, text=f"{gold} {sample}"))
    made_of = result_of(rows, protocol=PROTOCOL)
    asked = replace(made_of.suites["math_500"], data=dict(suite.provenance))
    write_result(tmp_path / "result", replace(made_of, suites={"math_500": asked}), rows)
    return tmp_path / "result"


@pytest.mark.parametrize("keep", KEPT)
def test_right_samples_that_ended_are_kept(keep: str, result: Path) -> None:
    out = result.parent / "traces.parquet"
    assert main(["bench", "traces", str(result), "--out", str(out), "--keep", keep]) == 0
    table = pyarrow.parquet.read_table(out)
    assert table.to_pylist() == [
        {
            "problem": f"Add {number}.\n\nPut the answer into a box.",
            "answer": str(number),
            "response": f"{number} {sample}",
            "sample": sample,
        }
        for number, sample in KEPT[keep]
    ]
    assert json.loads(table.schema.metadata[b"megatron-opd"])["keep"] == keep


def test_what_cannot_become_traces_is_one_line(
    result: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["bench", "traces", str(result), "--out", str(result.parent / "t.parquet")]
    assert main(asked) == 0
    assert main(asked) == 2 and "exists already" in capsys.readouterr().err
    assert main([*asked[:-1], str(result.parent / "t.txt")]) == 2
    (result.parent / "questions.jsonl").write_text('{"problem": "Another.", "answer": "1"}\n')
    assert main([*asked[:-1], str(result.parent / "u.parquet")]) == 2
    assert "its data are not those of the result" in capsys.readouterr().err
    assert not (result.parent / "u.parquet").exists()
