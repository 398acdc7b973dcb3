"""A user's function in math-verify's place, in real workers."""

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_opd.cli.main import main
from megatron_opd.contracts.rows import Row
from megatron_opd.recipe.rewards import RewardConfig
from megatron_opd.verify.pool import VerifierPool
from tests.rows import row, task
from tests.unit.tiny_model_files import write_recipe

FUNCTION = '''
import os
import time


def share_of_words(completion, gold):
    """How much of the gold answer's words a completion says."""
    if completion == "hang":
        while True:
            pass
    if completion == "die":
        os._exit(3)
    if completion == "boast":
        return 7
    words = gold.split()
    return sum(word in completion.split() for word in words) / len(words)


def is_polite(completion, gold):
    return "please" in completion


NUMBER = 3
'''


@pytest.fixture
def here(own_module: Callable[[str, str], Path]) -> Path:
    return own_module("own_reward", FUNCTION)


def said(text: str, gold: str = "two red balls") -> Row:
    return row([1], of=task(answer=gold), text=text, finish_reason="length")


def test_a_function_scores_whole_completions(here: Path) -> None:
    config = RewardConfig(function="own_reward:share_of_words", timeout_seconds=1.0)
    texts = ["red balls two", "two", "none", "hang", "die", "boast", "two red"]
    gold_less = said("", gold="")  # divides by zero
    with VerifierPool(config) as pool:
        scored = pool.score([*map(said, texts), gold_less])
    verdicts = [(r.verdict.reason, r.verdict.correct, r.reward) for r in scored]
    assert verdicts == [
        ("correct", True, 1.0),
        ("partly", False, pytest.approx(1 / 3)),
        ("wrong", False, 0.0),
        ("timeout", False, 0.0),
        ("crashed", None, 0.0),
        ("error", None, 0.0),
        ("partly", False, pytest.approx(2 / 3)),
        ("error", None, 0.0),
    ]


def test_whether_is_a_number_too(here: Path) -> None:
    with VerifierPool(RewardConfig(function="own_reward:is_polite")) as pool:
        scored = pool.score([said("please"), said("now")])
    assert [r.verdict.reason for r in scored] == ["correct", "wrong"]


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["reward.function=nowhere:f"], "reward.function: nowhere cannot be imported"),
        (["reward.function=own_reward:f"], "reward.function: own_reward has no f"),
        (["reward.function=own_reward"], "reward.function: must be written module:function"),
        (["rollout.engine=sglang"], "rollout.engine: must be vllm or written module:Class"),
        (["rollout.engine=own_reward:Engine"], "rollout.engine: own_reward has no Engine"),
        (
            ["reward.function=own_reward:NUMBER"],
            "reward.function: own_reward:NUMBER is no function",
        ),
        (
            ["reward.function=own_reward:is_polite", "reward.answer=boxed_or_last"],
            "reward.answer: no effect with reward.function",
        ),
    ],
)
def test_what_cannot_score_is_one_line(
    here: Path, overrides: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(here)
    assert main(["check", str(recipe), *overrides]) == 2
    assert problem in capsys.readouterr().err


def test_gold_answers_may_be_whatever_a_function_reads(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(here)
    main(["check", str(recipe), "reward.function=own_reward:is_polite"])
    assert "bad_gold" not in capsys.readouterr().err
