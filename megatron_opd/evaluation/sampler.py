"""An engine and a verifier without a trainer, in one process, for evaluations and traces."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from megatron_opd.architectures.config import ModelConfig
from megatron_opd.contracts.stations import Engine, Verifier
from megatron_opd.recipe.keys import RunConfig
from megatron_opd.rollout.open import start_vllm_engine
from megatron_opd.verify.open import open_verifier


@contextmanager
def open_sampler(config: RunConfig, model: ModelConfig) -> Iterator[tuple[Engine, Verifier]]:
    """vLLM with `model` and the recipe's rewards, closed again whatever happens."""
    with ExitStack() as closing:
        engine = start_vllm_engine(config, model)
        closing.callback(engine.close)
        yield engine, open_verifier(config.reward, closing)
