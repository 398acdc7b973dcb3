"""Checks of a model that is sampled without a trainer, before an engine starts."""

from dataclasses import replace
from pathlib import Path

from megatron_opd.architectures.architecture import architecture_of
from megatron_opd.architectures.config import ModelConfig
from megatron_opd.checks.environment import check_tasks
from megatron_opd.checks.hub import local_model
from megatron_opd.errors import ConfigError
from megatron_opd.recipe.keys import RunConfig
from megatron_opd.weights.check import check_weights


def model_to_sample(model: ModelConfig) -> ModelConfig:
    """The model with its directory on this machine. Raises DataError where it is not whole."""
    model = replace(model, path=local_model(model.path))
    check_weights(Path(model.path), architecture_of(model), sampled=True)
    return model


def model_to_evaluate(config: RunConfig, path: str | Path | None) -> ModelConfig:
    """The model at `path`, or the recipe's student. Raises ConfigError without held-out prompts."""
    check_tasks(config)
    if not (config.data.heldout_set or config.data.sets or config.environment):
        raise ConfigError(
            "data.heldout: missing; eval measures on held-out prompts, give data.heldout=FILE"
        )
    return model_to_sample(ModelConfig(str(path)) if path else config.student)
