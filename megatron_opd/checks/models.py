"""A model that is sampled on its own, before an engine starts."""

from dataclasses import replace
from pathlib import Path

from megatron_opd.architectures.architecture import architecture_of
from megatron_opd.architectures.config import ModelConfig
from megatron_opd.checks.hub import local_model
from megatron_opd.weights.check import check_weights


def model_to_sample(model: ModelConfig) -> ModelConfig:
    """The model with its directory on this machine. Raises DataError where it is not whole."""
    model = replace(model, path=local_model(model.path))
    check_weights(Path(model.path), architecture_of(model), sampled=True)
    return model
