"""An engine and a verifier without a trainer, for evaluations and traces: one process, the weights as they are."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from megatron_opd.config.schema import ModelConfig, RunConfig
from megatron_opd.reward.pool import RewardPool
from megatron_opd.rollout.engine import RolloutEngine


@contextmanager
def open_sampler(config: RunConfig, model: ModelConfig) -> Iterator[tuple[RolloutEngine, RewardPool]]:
    """vLLM with `model` and the recipe's rewards, closed again whatever happens."""
    with ExitStack() as closing:
        engine = RolloutEngine(
            model,
            config.rollout,
            precision=config.precision,
            max_sequence_length=config.max_sequence_length,
            seed=config.seed,
        )
        closing.callback(engine.close)
        rewards = RewardPool(config.reward)
        closing.callback(rewards.close)
        yield engine, rewards
