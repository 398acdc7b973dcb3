"""The engine that a recipe asks for."""

import contextlib
from typing import Any

from megatron_opd.architectures.config import ModelConfig
from megatron_opd.contracts.stations import Engine
from megatron_opd.recipe.keys import RunConfig
from megatron_opd.rollout.remote import RemoteEngine, ServedEngine
from megatron_opd.rollout.vllm.engine import VllmEngine
from megatron_opd.world.channel import Channel


def open_engine(
    config: RunConfig, channel: Channel | None, closing: contextlib.ExitStack
) -> Engine:
    """What samples from the student, without weights yet. Collective.

    It is in this process, or behind `channel` in those set aside for it; `closing` ends it.
    """
    if channel:
        return RemoteEngine(channel, config)
    engine = start_engine(config)
    closing.callback(engine.close)
    return engine


def start_engine(config: RunConfig, *, sleeps: bool = True) -> ServedEngine:
    """The student's engine in this process, without weights yet."""
    return start_vllm_engine(config, config.student, sleeps=sleeps, empty=True)


def start_vllm_engine(config: RunConfig, model: ModelConfig, **settings: Any) -> VllmEngine:
    """vLLM with `model` in this process; `settings` are further ones of `VllmEngine`."""
    return VllmEngine(
        model,
        config.rollout,
        precision=config.precision,
        max_sequence_length=config.max_sequence_length,
        seed=config.seed,
        **settings,
    )
