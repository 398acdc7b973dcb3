"""A model directory and what it is sampled with, without a trainer: for evaluations and traces."""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from megatron_opd.architectures.config import ModelConfig
from megatron_opd.contracts.rows import Task
from megatron_opd.contracts.stations import Engine, Sampler, Tokenizer, Verifier
from megatron_opd.evaluation.agents import Agents, open_agents
from megatron_opd.recipe.keys import EvalConfig, RunConfig
from megatron_opd.rollout.open import start_vllm_engine
from megatron_opd.rollout.single_turn import SingleTurn
from megatron_opd.tasks.data import load_heldout
from megatron_opd.verify.open import open_verifier

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenModel:
    """A model whose weights are version 0, with the recipe's verifier or environment."""

    config: RunConfig
    engine: Engine
    tokenizer: Tokenizer
    verifier: Verifier | None
    agents: Agents | None

    def heldout(self) -> dict[str, list[Task]]:
        """The recipe's held-out tasks, by set."""
        return heldout_tasks(self.config, self.tokenizer, self.agents)

    def samplers(self, settings: EvalConfig) -> dict[str, Sampler]:
        """By the prefix of their metrics."""
        if self.agents:
            return self.agents.evaluating(self.engine, settings)
        return {"": SingleTurn(self.engine, self.tokenizer)}


def heldout_tasks(
    config: RunConfig,
    tokenizer: Tokenizer,
    agents: Agents | None,
    warn: Callable[[str], None] = logger.warning,
) -> dict[str, list[Task]]:
    """The first `eval.num_prompts` held-out tasks, or all, of every set."""
    if agents is None:
        return load_heldout(config, tokenizer, warn)
    count = config.eval.num_prompts if config.eval else 0
    return {"": agents.tasks("heldout")[: count or None]}


@contextmanager
def open_model(config: RunConfig, model: ModelConfig, tokenizer: Tokenizer) -> Iterator[OpenModel]:
    """Samples from `model`; what it opens is closed again whatever happens."""
    with ExitStack() as closing:
        agents = open_agents(config, tokenizer, closing)
        verifier = None if agents else open_verifier(config, closing)
        engine = start_vllm_engine(config, model)
        closing.callback(engine.close)
        yield OpenModel(config, engine, tokenizer, verifier, agents)
