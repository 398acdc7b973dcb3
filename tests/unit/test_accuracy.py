"""How accuracies are shown: with an interval, and with the answers that there were not."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from megatron_opd.contracts.rows import Row, StepRecord, Verdict
from megatron_opd.evaluation.heldout import accuracy
from megatron_opd.metrics.console import open_console
from megatron_opd.metrics.sinks import Sinks
from megatron_opd.metrics.summary import reward_metrics
from megatron_opd.recipe.keys import EvalConfig, LogConfig
from megatron_opd.report.page import write_report
from megatron_opd.statistics.intervals import interval_95
from tests.rows import row, task
from tests.unit.test_metrics import make_config

HELD_OUT = {
    "eval/accuracy": 0.5,
    "eval/accuracy/low": 0.404,
    "eval/accuracy/high": 0.596,
    "eval/prompts": 100,
    "eval/truncated/mean": 0.25,
    "eval/unanswered/mean": 0.3,
    "eval/bad_gold": 2,
}


def test_an_accuracy_is_shown_with_what_it_takes_to_judge_it() -> None:
    stream = io.StringIO()
    console = open_console(make_config(), Console(file=stream, highlight=False, width=40))
    console.log(
        3,
        HELD_OUT
        | {"reward/mean": 0.5, "reward/unanswered/mean": 0.125, "rollout/truncated/mean": 0.0},
    )
    assert stream.getvalue() == (
        "step 3/80 reward 0.500 no answer 12.5% [held-out accuracy 50.0%, 95 % 40.4% to 59.6%, "
        "100 prompts, 30.0% without an answer, 25.0% cut off, 2 bad gold answers]\n"
    )


def test_the_report_says_what_an_accuracy_rests_on(tmp_path: Path) -> None:
    rewards = {"reward/bad_gold": 3, "reward/reason/over_budget": 40, "timing/step_seconds": 1.0}
    with Sinks(tmp_path / "run", replace(make_config(), log=LogConfig(tensorboard=False))) as sinks:
        sinks.log(StepRecord(0, HELD_OUT | rewards))
        sinks.log(StepRecord(1, HELD_OUT | rewards | {"eval/unanswered/mean": 0.1}))
    page = write_report(tmp_path / "run").read_text()
    for text in (
        "95 %: 40.4 to 59.6, n = 100",
        "30.0% → </small>10.0%",
        "held out, 25.0% cut off at the token limit",
    ):
        assert text in page
    assert "6 prompts had a gold answer that nothing can be compared with" in page
    assert "80 answers were not judged within reward.budget_seconds" in page


def rows_of(reasons: list[str]) -> list[Row]:
    return [
        row(
            [0], of=task(i // 2), sample=i % 2, group=i // 2, logprobs=0.0,
            finish_reason="length" if reason == "truncated" else "stop",
            reward=float(reason == "correct"),
            verdict=Verdict(float(reason == "correct"), reason == "correct", reason),
        )
        for i, reason in enumerate(reasons)
    ]  # fmt: skip


def test_completions_without_an_answer_and_bad_golds_are_counted() -> None:
    rows = rows_of(
        ["correct", "truncated", "no_answer", "wrong", "bad_gold", "bad_gold", "bad_gold", "wrong"]
    )
    metrics = reward_metrics(rows)
    assert metrics["reward/unanswered/mean"] == 0.25
    assert metrics["reward/bad_gold"] == 2, "prompts, not answers"
    assert "reward/unanswered/mean" not in reward_metrics(rows_of(["unscored"] * 4))
    groups = [rows[i : i + 2] for i in range(0, 8, 2)]
    held_out = accuracy(groups, EvalConfig(samples_per_prompt=2, temperature=1.0))
    assert (held_out["eval/prompts"], held_out["eval/bad_gold"], held_out["eval/accuracy"]) == (
        4,
        2,
        0.125,
    )
    assert (held_out["eval/truncated/mean"], held_out["eval/unanswered/mean"]) == (0.125, 0.25)
    assert 0 < held_out["eval/accuracy/low"] < 0.125 < held_out["eval/accuracy/high"] < 0.5


@pytest.mark.parametrize(
    ("right", "prompts", "interval"),
    [
        (0, 20, (0.0, 0.161)),
        (50, 100, (0.404, 0.596)),
        (27, 30, (0.744, 0.965)),
        (20, 20, (0.839, 1.0)),
    ],
)
def test_one_answer_per_prompt_has_wilsons_interval(
    right: int, prompts: int, interval: tuple[float, float]
) -> None:
    rewards_NK = (np.arange(prompts) < right).astype(float)[:, None]
    assert interval_95(rewards_NK) == pytest.approx(interval, abs=1e-3)


def test_the_interval_covers_the_accuracy_on_all_prompts_with_several_answers_each() -> None:
    """A thousand evaluations of 40 prompts with 8 answers each, of prompts that are hard or
    easy."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(1000):
        difficulty_N1 = rng.beta(0.5, 0.8, size=(40, 1))
        low, high = interval_95((rng.random((40, 8)) < difficulty_N1).astype(float))
        covered += low <= 0.5 / 1.3 <= high
    assert 930 <= covered <= 970
