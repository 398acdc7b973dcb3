"""An engine and a verifier without a trainer, for evaluations and traces: one process, the weights
as they are."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from megatron_opd.architectures.config import ModelConfig
from megatron_opd.recipe.keys import RunConfig
from megatron_opd.rollout.vllm.engine import VllmEngine
from megatron_opd.verify.pool import VerifierPool


@contextmanager
def open_sampler(
    config: RunConfig, model: ModelConfig
) -> Iterator[tuple[VllmEngine, VerifierPool]]:
    """vLLM with `model` and the recipe's rewards, closed again whatever happens."""
    with ExitStack() as closing:
        engine = VllmEngine(
            model,
            config.rollout,
            precision=config.precision,
            max_sequence_length=config.max_sequence_length,
            seed=config.seed,
        )
        closing.callback(engine.close)
        rewards = VerifierPool(config.reward)
        closing.callback(rewards.close)
        yield engine, rewards
