"""The engine and the sampler that a recipe asks for."""

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

from megatron_opd.architectures.config import ModelConfig
from megatron_opd.architectures.ends import merged_ends, read_ends
from megatron_opd.contracts.stations import Engine, Sampler, Tokenizer
from megatron_opd.files.own_code import load_own
from megatron_opd.recipe.keys import RunConfig
from megatron_opd.rollout.mixture import Mixture
from megatron_opd.rollout.remote import RemoteEngine, ServedEngine
from megatron_opd.rollout.single_turn import SingleTurn
from megatron_opd.rollout.traces import WithTraces
from megatron_opd.world.channel import Channel

if TYPE_CHECKING:
    from megatron_opd.rollout.vllm.engine import VllmEngine


def open_engine(
    config: RunConfig, channel: Channel | None, closing: contextlib.ExitStack
) -> Engine:
    """The engine that samples from the student, without weights yet. Collective.

    It is in this process, or behind `channel` in processes of its own; `closing` ends it.
    """
    if channel:
        return RemoteEngine(channel, config)
    engine = start_engine(config)
    closing.callback(engine.close)
    return engine


def open_teacher_engine(config: RunConfig, closing: contextlib.ExitStack) -> Engine | None:
    """A second engine of this process, with the teacher; None unless it draws some tokens."""
    if not (config.method.teacher_share and config.teacher):
        return None
    ends = read_ends(config.student.path)
    engine = start_vllm_engine(config, config.teacher, sleeps=False, further_ends=ends.ids)
    closing.callback(engine.close, groups_too=False)
    return engine


def open_sampler(
    config: RunConfig, engine: Engine, teacher_engine: Engine | None, tokenizer: Tokenizer
) -> Sampler:
    """The sampler of a step's rows, for a method that samples."""
    method = config.method
    sampler: Sampler
    if teacher_engine and config.teacher:
        merged = merged_ends(config.student.path, config.teacher.path)
        sampler = Mixture(engine, teacher_engine, tokenizer, method.teacher_share, merged)
    else:
        sampler = SingleTurn(engine, tokenizer, method.prefix)
    return WithTraces(sampler, method.traces_per_group) if method.traces_per_group else sampler


def start_engine(config: RunConfig, *, sleeps: bool = True) -> ServedEngine:
    """The student's engine in this process, without weights yet: vLLM, or the recipe's own."""
    if config.rollout.engine != "vllm":
        own_class = cast(Callable[[RunConfig], ServedEngine], load_own(config.rollout.engine))
        return own_class(config)
    return start_vllm_engine(config, config.student, sleeps=sleeps, empty=True)


def start_vllm_engine(
    config: RunConfig,
    model: ModelConfig,
    *,
    sleeps: bool = True,
    empty: bool = False,
    further_ends: Sequence[int] = (),
) -> "VllmEngine":
    """vLLM with `model` in this process; the arguments are those of `VllmEngine`."""
    from megatron_opd.rollout.vllm.engine import VllmEngine  # a run with another needs no vLLM

    return VllmEngine(
        model,
        config.rollout,
        precision=config.precision,
        max_sequence_length=config.max_sequence_length,
        seed=config.seed,
        sleeps=sleeps,
        empty=empty,
        further_ends=further_ends,
    )
