"""The verifier that a recipe asks for."""

import contextlib

from megatron_opd.contracts.stations import Verifier
from megatron_opd.recipe.keys import RewardConfig
from megatron_opd.verify.pool import VerifierPool


def open_verifier(config: RewardConfig, closing: contextlib.ExitStack) -> Verifier:
    """The recipe's verifier. Its workers start in the background; `closing` ends them."""
    pool = VerifierPool(config)
    closing.callback(pool.close)
    pool.warm_up()
    return pool
