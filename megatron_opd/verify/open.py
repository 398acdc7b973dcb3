"""The verifier that a recipe asks for."""

import contextlib
import sys
from dataclasses import replace
from typing import assert_never

from megatron_opd.contracts.stations import Verifier
from megatron_opd.recipe.keys import RunConfig
from megatron_opd.recipe.rewards import (
    ChoiceReward,
    CodeReward,
    FormatReward,
    MathReward,
    PythonReward,
    Reward,
    RewardConfig,
)
from megatron_opd.verify.graders.choice import ChoiceGrader
from megatron_opd.verify.graders.code import CodeGrader
from megatron_opd.verify.graders.maths import Judges
from megatron_opd.verify.pool import VerifierPool
from megatron_opd.verify.rewards import (
    ChoiceRows,
    CodeRows,
    FunctionGrader,
    PatternGrader,
    RewardSum,
    RowGrader,
    VerifierGrader,
    Weighted,
)

_ANY_LENGTH = sys.maxsize  # of what is read as it is, in characters


def open_verifier(config: RunConfig, closing: contextlib.ExitStack) -> Verifier:
    """The recipe's verifier. Its workers start in the background; `closing` ends them.

    Raises ConfigError where a program cannot be run on this machine.
    """
    if config.reward.is_plain:
        return _opened(config.reward, closing)
    rewards = config.reward.graded
    weighted = {
        name: Weighted(reward, _grader(reward, config.reward, closing))
        for name, reward in rewards.items()
    }
    if not weighted:
        function = VerifierGrader(_opened(config.reward, closing))
        weighted = {"function": Weighted(MathReward(), function)}
    longest = config.rollout.max_completion_tokens
    return RewardSum(weighted, config.reward.length_penalty, longest)


def open_judges(config: RewardConfig, judge: str, closing: contextlib.ExitStack) -> Judges:
    """Workers of a judge of suites, within the recipe's limits of time and length."""
    return _opened(replace(config, function=None), closing, judge)


def _grader(reward: Reward, config: RewardConfig, closing: contextlib.ExitStack) -> RowGrader:
    of_any_length = replace(config, max_characters=_ANY_LENGTH)
    match reward:
        case MathReward():
            return VerifierGrader(_opened(replace(config, answer=reward.answer), closing, "math"))
        case ChoiceReward():
            return ChoiceRows(ChoiceGrader(), reward.options_column)
        case CodeReward():
            of_programs = CodeGrader(reward.grading)
            closing.callback(of_programs.close)
            return CodeRows(of_programs)
        case FormatReward():
            return PatternGrader(_opened(of_any_length, closing, "pattern"), reward.pattern)
        case PythonReward():
            return FunctionGrader(_opened(of_any_length, closing, "row", reward.python))
        case _:
            assert_never(reward)


def _opened(config: RewardConfig, closing: contextlib.ExitStack, *judge: str) -> VerifierPool:
    pool = VerifierPool(config, *judge)
    closing.callback(pool.close)
    pool.warm_up()
    return pool
