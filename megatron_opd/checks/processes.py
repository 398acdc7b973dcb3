"""Checks that a run has enough processes, and that those of its roles divide by the layouts."""

import math

from megatron_opd.architectures.config import ModelConfig
from megatron_opd.errors import ConfigError
from megatron_opd.methods.needs import needs_of
from megatron_opd.recipe.keys import RunConfig


def processes_needed(config: RunConfig) -> int:
    """The smallest number of processes that a run can have."""
    return processes_shared(config) + sum(config.processes_apart.values())


def processes_shared(config: RunConfig) -> int:
    """The number of which the processes of no single role must be a multiple.

    Every layout's TP x PP x CP, and EP x ETP x PP, divides the number of processes: their least
    common multiple.
    """
    return math.lcm(*(size for _, model in _sharing(config) for size in _sizes(model)))


def sequences_per_step(config: RunConfig) -> int:
    """Rollouts and traces of a step; where nothing is sampled, one trace of each prompt."""
    if not needs_of(config.method).rollouts:
        return config.rollout.num_prompts
    group = config.rollout.samples_per_prompt + config.method.traces_per_group
    return config.rollout.num_prompts * group


def samples(config: RunConfig) -> bool:
    """True when a run samples, to train or to evaluate."""
    return needs_of(config.method).rollouts or config.eval is not None


def check_processes(config: RunConfig, world_size: int) -> None:
    """Raises ConfigError unless `world_size` processes are enough, and divide."""
    roles = config.processes_apart
    needed = processes_shared(config)
    apart = sum(roles.values())
    if apart >= world_size:
        keys = " + ".join(f"{role}.processes" for role in roles)
        raise ConfigError(
            f"{keys}: {apart} of {world_size} leave the student none; {_start(needed + apart)}"
        )
    world_size -= apart
    widest, model = max(_sharing(config), key=lambda named: max(_sizes(named[1])))
    if world_size % needed:
        at_least = "at least" if world_size < needed else "a multiple of"
        rounded = max(needed, world_size // needed * needed)
        beside = " and ".join(f"the {role}'s {size}" for role, size in roles.items())
        there = f"{world_size} beside {beside}" if apart else f"{world_size}"
        raise ConfigError(
            f"{widest}.layout: {_shown(model)} needs {at_least} {needed} processes, there would be "
            f"{there}; {_start(rounded + apart)}"
        )
    data_parallel = world_size // config.student.layout.model_parallel_size
    sequences = sequences_per_step(config) // config.train.updates_per_step
    if sequences % data_parallel:
        raise ConfigError(
            f"rollout.num_prompts: the {sequences} sequences of an update do not divide among the "
            f"student's {data_parallel} data-parallel replicas; make them a multiple"
        )


def check_rollout_processes(config: RunConfig) -> None:
    """Raises ConfigError unless engines may have the processes set aside for them."""
    if config.rollout.processes and config.method.teacher_share:
        raise ConfigError(
            "rollout.processes: with method.teacher_share student and teacher sample on the "
            "student's processes; remove it"
        )
    if config.rollout.processes and not samples(config):
        raise ConfigError(
            f"rollout.processes: no effect, method {config.method.name} samples nothing; remove it"
        )


def check_teacher_processes(config: RunConfig) -> None:
    """Raises ConfigError unless the teacher may have the processes set aside for it."""
    key = "teacher.processes"
    apart = config.teacher_processes
    needs = needs_of(config.method)
    if not apart or config.teacher is None:
        return
    if config.method.teacher_share:
        raise ConfigError(
            f"{key}: with method.teacher_share the student's processes hold the teacher too; "
            "remove it"
        )
    if needs.teacher_head:
        raise ConfigError(
            f"{key}: a term on whole distributions needs the teacher beside the student; remove it"
        )
    if not needs.teacher:
        raise ConfigError(
            f"{key}: no effect, method {config.method.name} reads no teacher; remove it"
        )
    if config.teacher.offload:
        raise ConfigError(
            f"teacher.offload: no effect with {key}, whose devices hold nothing else; remove it"
        )
    needed = math.lcm(*_sizes(config.teacher))
    if apart % needed:
        raise ConfigError(
            f"{key}: teacher.layout, {_shown(config.teacher)}, needs a multiple of {needed}, not "
            f"{apart}"
        )


def _sharing(config: RunConfig) -> list[tuple[str, ModelConfig]]:
    """The models that lie on the same processes as the student."""
    models = list(config.models.items())
    return models[:1] if config.teacher_processes else models


def _sizes(model: ModelConfig) -> tuple[int, int]:
    layout = model.layout
    return (
        layout.model_parallel_size,
        layout.expert_parallel_size * layout.pipeline_model_parallel_size,
    )


def _shown(model: ModelConfig) -> str:
    layout = model.layout
    sizes = f"TP {layout.tensor_model_parallel_size} x PP {layout.pipeline_model_parallel_size}"
    if layout.context_parallel_size > 1:
        sizes += f" x CP {layout.context_parallel_size}"
    if layout.expert_model_parallel_size > 1:
        sizes += f" with EP {layout.expert_model_parallel_size}"
    if layout.expert_tensor_parallel_size > 1:
        sizes += f" with ETP {layout.expert_tensor_parallel_size}"
    return sizes


def _start(processes: int) -> str:
    return f"start {processes} in all (--nproc, or cluster.nodes x cluster.processes_per_node)"
