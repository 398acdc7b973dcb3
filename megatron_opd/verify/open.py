"""The verifier that a recipe asks for."""

import contextlib
from dataclasses import replace

from megatron_opd.contracts.stations import Verifier
from megatron_opd.recipe.keys import RewardConfig
from megatron_opd.verify.graders.maths import Judges
from megatron_opd.verify.pool import VerifierPool


def open_verifier(config: RewardConfig, closing: contextlib.ExitStack) -> Verifier:
    """The recipe's verifier. Its workers start in the background; `closing` ends them."""
    return _opened(config, "math", closing)


def open_judges(config: RewardConfig, judge: str, closing: contextlib.ExitStack) -> Judges:
    """Workers of a judge of suites, within the recipe's limits of time and length."""
    return _opened(replace(config, function=None), judge, closing)


def _opened(config: RewardConfig, judge: str, closing: contextlib.ExitStack) -> VerifierPool:
    pool = VerifierPool(config, judge)
    closing.callback(pool.close)
    pool.warm_up()
    return pool
