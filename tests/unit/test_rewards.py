"""Rewards of every kind, alone and in a sum, in real workers and a real sandbox."""

import contextlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_opd.cli.main import main
from megatron_opd.contracts.rows import Row, Verdict, with_episodes, without_columns
from megatron_opd.errors import ConfigError, RunError
from megatron_opd.evaluation.heldout import accuracy
from megatron_opd.metrics.run_directory import sample_line
from megatron_opd.metrics.summary import reward_metrics
from megatron_opd.recipe.keys import EvalConfig, RunConfig
from megatron_opd.recipe.load import load_config
from megatron_opd.report.sources import read_rewards, read_sources
from megatron_opd.runs.collect import check_verdicts
from megatron_opd.verify.columns import gold_letter, options_of, program_tests
from megatron_opd.verify.open import open_verifier
from tests.rows import row, task
from tests.unit.tiny_model_files import write_recipe

FUNCTIONS = """
import os
import time

from megatron_opd.contracts.rows import Verdict


def graded(prompt, completion, row, tokens):
    if completion == "hang":
        time.sleep(1000)
    if completion == "die":
        os._exit(3)
    if completion == "raise":
        raise ValueError("no\\nsuch answer")
    if completion == "nan":
        return float("nan")
    if completion == "none":
        return None
    if completion == "verdict":
        return Verdict(0.25, True, "lucky", "7")
    if completion == "words":
        return Verdict(1.0, True, "two words")
    return row["scale"] * (len(tokens) + prompt.count("?"))


def two(completion, gold):
    return 1.0


def by_name(completion, *, prompt, row, tokens):
    return 1.0


NUMBER = 3
"""


def config_of(folder: Path, **reward: Any) -> RunConfig:
    """A recipe with this reward, and 10 tokens at most in a completion."""
    changes = {"reward": reward, "data": {"train": str(folder / "train.jsonl")}}
    if any(one and one.get("sources") for one in reward.get("rewards", {}).values()):
        changes["data"]["source_column"] = "from"
    return load_config(str(write_recipe(folder, **changes)), ["rollout.max_completion_tokens=10"])


def scored(config: RunConfig, rows: list[Row]) -> list[Row]:
    with contextlib.ExitStack() as closing:
        return open_verifier(config, closing).score(rows)


def said(completion: str, *, tokens: int = 2, **of: Any) -> Row:
    return row([1] * tokens, of=task(**of), text=completion)


@pytest.fixture
def here(own_module: Callable[[str, str], Path]) -> Path:
    return own_module("own_rewards", FUNCTIONS)


def test_a_function_gets_the_row_and_survives_what_it_does(
    here: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also as a file by its path, which may lie elsewhere."""
    (here / "elsewhere").mkdir()
    (here / "elsewhere" / "mine.py").write_text(FUNCTIONS)
    config = config_of(here, kind="python", python="elsewhere/mine.py:graded", timeout_seconds=0.3)
    texts = ["a", "hang", "die", "raise", "nan", "none", "verdict", "words"]
    rows = [said(text, text="what?", columns={"scale": -0.5}) for text in texts]
    verdicts = [one.verdict for one in scored(config, rows)]
    assert [(v.reason, v.correct, v.score) for v in verdicts] == [
        ("wrong", False, -1.5),
        ("timeout", False, 0.0),
        ("crashed", None, 0.0),
        ("error", None, 0.0),
        ("error", None, 0.0),
        ("error", None, 0.0),
        ("lucky", True, 0.25),
        ("error", None, 0.0),
    ]
    assert verdicts[6].extracted == "7"
    assert "failed on 4 of 8 answers, first with ValueError: no such answer" in caplog.text


def test_a_sum_is_weighted_routed_and_penalised(here: Path) -> None:
    """The first reward that grades a row says whether it is right; every verdict is kept."""
    config = config_of(
        here,
        rewards={
            "options": {"kind": "choice", "sources": ["exam"]},
            "own": {"kind": "python", "python": "own_rewards:graded", "sources": ["free"]},
            "shape": {"kind": "format", "weight": 0.5, "pattern": r"The answer.*"},
        },
        length_penalty={"overlong": 0.5, "weight": 2.0},
    )
    exam = {"source": "exam", "answer": "two", "columns": {"options": ["one", "two"]}}
    free = {"source": "free", "columns": {"scale": 0.5}}
    rows = [
        said("The answer is B.", **exam),
        said("The answer is A.", tokens=8, **exam),
        said("B", **(exam | {"answer": "three"})),
        said("no", tokens=10, **free),
    ]
    judged = scored(config, rows)
    assert [(r.verdict.reason, r.verdict.correct) for r in judged] == [
        ("correct", True),
        ("wrong", False),
        ("bad_gold", None),
        ("correct", True),
    ]
    # the last half of 10 tokens costs up to 2
    assert [r.reward for r in judged] == [1.5, 0.5 - 2 * 0.6, 0.0, 5.0 - 2.0]
    assert [dict(r.episode.verdicts).keys() for r in judged] == [
        {"options", "shape", "length_penalty"}
    ] * 3 + [{"own", "shape", "length_penalty"}]
    metrics = reward_metrics([replace(r, episode=replace(r.episode, group=i)) for i, r in
                              enumerate(judged)])  # fmt: skip
    assert metrics["reward/of/shape/mean"] == 0.5
    assert metrics["reward/of/options/mean"] == pytest.approx(1 / 3)
    assert metrics["reward/of/options/failed"] == 1
    assert metrics["reward/of/length_penalty/mean"] == pytest.approx(-0.4)
    assert metrics["reward/source/exam/episodes"] == 3
    assert metrics["reward/source/exam/correct/mean"] == pytest.approx(1 / 3)
    assert metrics["reward/source/free/mean"] == 3.0
    line = sample_line(0, judged[0], None)
    assert line["source"] == "exam"
    assert line["rewards"]["shape"] == {"score": 1.0, "reason": "correct"}
    assert without_columns(judged)[0].task.columns == {}


def test_an_opened_reasoning_is_part_of_the_format(tmp_path: Path) -> None:
    """A pattern that takes for ever is a timeout."""
    config = config_of(tmp_path, kind="format")
    opened = {"text": "say <think>\n"}
    rows = [
        said("hm</think> 5", **opened),
        said("hm</think>", **opened),
        said("hm</think> 5"),
        said("<think>hm</think>5"),
    ]
    assert [r.reward for r in scored(config, rows)] == [1.0, 0.0, 0.0, 1.0]
    slow = {"slow": {"kind": "format", "pattern": "(a*)*b"}}
    config = config_of(tmp_path, rewards=slow, timeout_seconds=0.2)
    (judged,) = scored(config, [said("a" * 40)])
    assert (judged.verdict.reason, judged.reward) == ("timeout", 0.0)


def test_programs_run_in_the_sandbox(tmp_path: Path) -> None:
    config = config_of(tmp_path, kind="code")
    gold = json.dumps({"inputs": ["1 2\n", ["3", "4"]], "outputs": ["3\n", "7"]})
    program = "print(sum(map(int, open(0).read().split())))"
    rows = [
        said(f"```python\n{program}\n```", answer=gold),
        said("```python\nprint(3)\n```", answer=gold),
        said("no program", answer=gold),
        said("```python\nprint(3)\n```", answer="3", index=1),
    ]
    assert [(r.verdict.reason, r.reward) for r in scored(config, rows)] == [
        ("correct", 1.0),
        ("wrong", 0.0),
        ("no_answer", 0.0),
        ("bad_gold", 0.0),
    ]


def test_options_and_tests_are_read_in_the_forms_of_data_sets() -> None:
    arc = {"options": {"label": ["A", "B"], "text": ["x", "y"]}}
    by_letter = {"options": '{"B": "y", "A": "x"}'}
    assert options_of(arc, "options") == options_of(by_letter, "options") == ("x", "y")
    assert options_of({}, "options") == ("",) * 10
    assert options_of({"options": "x or y"}, "options") is None
    assert [gold_letter(g, ("x", "y")) for g in ("b", "(A)", "y", "C", "")] == [
        "B", "A", "B", None, None
    ]  # fmt: skip
    columns = {"public_test_cases": "[]", "private_test_cases": "[1]"}
    assert program_tests(task(columns=columns)) == columns
    pairs = {"inputs": ["1"], "outputs": [["2", "3"]]}
    expected = {"public_test_cases": [{"input": "1", "output": "2\n3", "testtype": "stdin"}]}
    assert program_tests(task(columns={"input_output": json.dumps(pairs)})) == expected
    assert program_tests(task(answer=json.dumps(pairs | {"fn_name": "f"}))) == {}


def test_failures_of_any_reward_are_warned_of_and_end_the_run() -> None:
    def failing(share: float) -> list[Row]:
        bad = Verdict(0.0, None, "error")
        good = Verdict(1.0, True, "correct")
        rows = []
        for number in range(20):
            second = bad if number < 20 * share else good
            judged = row([1], group=number, verdict=good)
            verdicts = (("math", good), ("mine", second))
            rows += with_episodes([judged], lambda e, v=verdicts: replace(e, verdicts=v))
        return rows

    assert check_verdicts(failing(0.05), 3) is None
    warning = check_verdicts(failing(0.1), 3)
    assert warning is not None and "2 of 20 answers" in warning
    assert "by reward.rewards.mine (2 error)" in warning
    with pytest.raises(RunError, match=r"by reward\.rewards\.mine"):
        check_verdicts(failing(0.6), 3)


def test_sources_are_told_apart_held_out_and_in_the_report() -> None:
    right = Verdict(1.0, True, "correct")
    wrong = Verdict(0.0, False, "wrong")
    groups = [
        [row([1], of=task(0, source="exam"), group=0, verdict=right)],
        [row([1], of=task(1, source="exam"), group=1, verdict=wrong)],
        [row([1], of=task(2, source="free"), group=2, verdict=right)],
    ]
    metrics = accuracy(groups, EvalConfig())
    assert metrics["eval/source/exam/accuracy"] == 0.5
    assert (
        metrics["eval/source/exam/accuracy/low"] < 0.5 < metrics["eval/source/exam/accuracy/high"]
    )
    assert metrics["eval/source/free/prompts"] == 1
    lines = [
        {"step": step, "reward/source/exam/mean": step / 4, "reward/source/exam/episodes": 3}
        | {"reward/source/exam/correct/mean": 0.5, "reward/of/mine/mean": 1.0}
        | {"reward/of/mine/failed": 1}
        for step in range(4)
    ]
    exam, free = read_sources([{"step": 0} | metrics, *lines, {"step": 4} | metrics])
    assert (exam.episodes, exam.reward.first, exam.reward.last) == ("12", "0.000", "0.750")
    assert exam.heldout.first == exam.heldout.last
    assert (free.episodes, free.interval[-5:]) == ("", "n = 1")
    (mine,) = read_rewards(lines)
    assert (mine.name, mine.mean.last, mine.failed) == ("mine", "1.000", "4")
    assert read_sources([{"step": 0}]) == []


PYTHON = {"kind": "python", "python": "own_rewards:graded"}


@pytest.mark.parametrize(
    ("reward", "problem"),
    [
        ({"kind": "python"}, "reward.python: missing"),
        ({"python": "own_rewards:graded"}, "reward.python: no effect with reward.kind=math"),
        ({"kind": "code", "answer": "boxed_or_last"}, "reward.answer: no effect"),
        ({"kind": "python", "python": "nowhere.py:f"}, "nowhere.py cannot be imported"),
        ({"kind": "python", "python": "own_rewards:two"}, "must take (prompt, completion, row"),
        ({"kind": "python", "python": "own_rewards:by_name"}, "must take (prompt, completion"),
        ({"kind": "python", "python": "own_rewards:NUMBER"}, "is no function"),
        ({"function": "own_rewards:two", "kind": "code"}, "reward.kind: no effect with reward.f"),
        ({"kind": "code", "rewards": {"a": PYTHON}}, "reward.kind: no effect with reward.rewards"),
        ({"rewards": {"a": None}}, "reward.rewards: every reward is null"),
        ({"rewards": {"a/b": PYTHON}}, "'a/b' cannot be the name of a reward"),
        ({"rewards": {"length_penalty": PYTHON}}, "cannot be the name of a reward"),
        ({"rewards": {"a": PYTHON | {"sources": ["x"]}}}, "needs data.source_column"),
        ({"rewards": {"a": {"kind": "format", "pattern": "("}}}, "no regular expression"),
        ({"rewards": {"a": {"kind": "maths"}}}, "unknown kind; did you mean math"),
        ({"rewards": {"a": PYTHON | {"weight": float("inf")}}}, "finite number"),
    ],
)
def test_what_cannot_grade_is_one_line(
    here: Path, reward: dict[str, Any], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(here, reward=reward)
    assert main(["check", str(recipe)]) == 2
    error = capsys.readouterr().err
    assert problem in error and error.count("\n") == 1


def test_a_penalty_is_taken_once(here: Path) -> None:
    recipe = write_recipe(here, reward={"length_penalty": {}})
    method = {"name": "grpo", "policy": {"advantages": {"reward": {"overlong": 0.1}}}}
    from megatron_opd.checks.rewards import check_reward_keys

    config = load_config(str(recipe), [f"method={json.dumps(method)}", "teacher=null"])
    with pytest.raises(ConfigError, match=r"reward\.length_penalty: method.*overlong takes it"):
        check_reward_keys(config)


@pytest.mark.parametrize(
    ("rewards", "code", "words"),
    [
        ({"a": {"kind": "math", "sources": ["x"]}}, 2, "no reward grades the 4 rows of source 'y'"),
        ({"a": {"kind": "math", "sources": ["x", "y", "z"]}}, 0, "no row has source z"),
        (
            {"a": {"kind": "math", "sources": ["x"]}, "b": {"kind": "format"}},
            0,
            "data.train: 4 of 8 rows, of source 'y', count as right by their format",
        ),
        ({"a": {"kind": "choice"}}, 2, "bad_gold: 8 of 8 gold answers name no option, first row 1"),
        ({"a": {"kind": "code"}}, 2, "bad_gold: 8 of 8 rows have no tests that can be run, first"),
    ],
)
def test_rows_that_nothing_grades_are_refused(
    tmp_path: Path, rewards: dict[str, Any], code: int, words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    recipe = write_recipe(tmp_path, reward={"rewards": rewards})
    lines = [{"problem": f"{i}+1=", "answer": str(i), "from": "xy"[i % 2]} for i in range(8)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    overrides = [f"data.train={data}", "data.source_column=from", "data.heldout=null", "eval=null"]
    assert main(["check", str(recipe), *overrides]) == code
    assert words in "".join(capsys.readouterr())
