"""A recipe as an object, for tests that update a model: supervised, in float32, with nothing to
read from disk."""

from dataclasses import replace
from typing import Any

from megatron_opd.architectures.config import LayoutConfig, ModelConfig
from megatron_opd.methods.catalogue import CATALOGUE
from megatron_opd.recipe.data import DataConfig
from megatron_opd.recipe.keys import OptimizerConfig, RunConfig, TrainConfig


def tiny_config(lr: float = 0.1, layout: LayoutConfig | None = None, **changes: Any) -> RunConfig:
    """`changes`: keys of OptimizerConfig, TrainConfig and RunConfig, by their last name."""
    optimizer, train = (
        {key: changes.pop(key) for key in list(changes) if key in section.__dataclass_fields__}
        for section in (OptimizerConfig, TrainConfig)
    )
    config = RunConfig(
        name="tiny",
        num_steps=9,
        max_sequence_length=64,
        method=CATALOGUE["sft"].method,
        precision="float32",
        student=ModelConfig("", layout=layout or LayoutConfig()),
        data=DataConfig(""),
        train=TrainConfig(OptimizerConfig(lr, **optimizer), **train),
    )
    return replace(config, **changes)
