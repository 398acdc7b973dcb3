"""A model directory and a verifier without a trainer, for evaluations and traces."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from megatron_opd.architectures.config import ModelConfig
from megatron_opd.contracts.stations import Sampler, Tokenizer, Verifier
from megatron_opd.recipe.keys import RunConfig
from megatron_opd.rollout.open import start_vllm_engine
from megatron_opd.rollout.single_turn import SingleTurn
from megatron_opd.verify.open import open_verifier


@contextmanager
def open_model(
    config: RunConfig, model: ModelConfig, tokenizer: Tokenizer
) -> Iterator[tuple[Sampler, Verifier]]:
    """Samples from `model`, whose weights are version 0, with the recipe's verifier; both are
    closed again whatever happens."""
    with ExitStack() as closing:
        engine = start_vllm_engine(config, model)
        closing.callback(engine.close)
        yield SingleTurn(engine, tokenizer), open_verifier(config.reward, closing)
