"""Checks that layouts, lengths, vocabularies and batches fit, by the architectures alone."""

from megatron_opd.architectures.architecture import Architecture
from megatron_opd.architectures.config import LayoutConfig, ModelConfig
from megatron_opd.checks.guides import check_positions, longest_read
from megatron_opd.checks.processes import (
    check_processes,
    check_rollout_processes,
    check_teacher_processes,
    samples,
)
from megatron_opd.errors import ConfigError
from megatron_opd.methods.catalogue import CATALOGUE
from megatron_opd.methods.needs import needs_of, process_reward
from megatron_opd.methods.part import parts_of
from megatron_opd.recipe.keys import RunConfig, TeacherConfig


def check_sizes(
    config: RunConfig, architectures: dict[str, Architecture], *, world_size: int | None
) -> list[str]:  # fmt: skip
    """Checks that layouts, lengths, vocabularies and batches divide and fit.

    `architectures` has the "student" and, where there is one, the "teacher"; no model directory is
    read. Returns warnings. Raises ConfigError.
    """
    for name, model in config.models.items():
        _check_layout(name, model, architectures[name])
    check_positions(config, architectures)
    _check_reach(config, architectures["student"])
    warnings = _check_vocabularies(config, architectures)
    _check_lengths(config)
    _check_batch(config)
    check_rollout_processes(config)
    check_teacher_processes(config)
    if world_size is not None:
        check_processes(config, world_size)
    return warnings


def _check_reach(config: RunConfig, student: Architecture) -> None:
    """vLLM has rotary angles for no more positions than YaRN stretches the original context to."""
    scaling = student.rope_scaling
    if scaling is None or scaling.rope_type != "yarn":
        return
    reach = int(scaling.factor * scaling.original_max_position_embeddings)
    if config.max_sequence_length > reach:
        raise ConfigError(
            f"max_sequence_length: {config.max_sequence_length} is more than the {reach} positions "
            f"that the factor {scaling.factor:g} of the RoPE scaling in "
            f"{config.student.path}/config.json reaches"
        )


def _check_vocabularies(config: RunConfig, architectures: dict[str, Architecture]) -> list[str]:
    method = config.method
    needs = needs_of(method)
    sizes = {name: architecture.vocab_size for name, architecture in architectures.items()}
    smallest = min(sizes.values())
    if needs.teacher_head and config.teacher:
        _check_teacher_head(config.student.layout, config.teacher)
        if len(set(sizes.values())) > 1 and config.teacher.layout.tensor_model_parallel_size > 1:
            raise ConfigError(
                "teacher.layout.tensor_model_parallel_size: must be 1 for a term on whole "
                f"distributions, since the teacher's vocabulary has {sizes['teacher']} rows and "
                f"the student's {sizes['student']}"
            )
    for key, part in parts_of(method.terms, "method"):
        part.check_vocabulary(key, smallest)
    if needs.topk <= smallest:
        return []
    if method.name in CATALOGUE and needs_of(CATALOGUE[method.name].method).topk == needs.topk:
        return [
            f"method: the top {needs.topk} of {method.name} are all {smallest} tokens of this "
            "vocabulary"
        ]
    key = next(
        key for key, part in parts_of(method.terms, "method") if part.needs().topk > smallest
    )
    raise ConfigError(f"{key}.k: {needs.topk} is more than the {smallest} tokens of the vocabulary")


def _check_teacher_head(student: LayoutConfig, teacher: TeacherConfig) -> None:
    """During the update every rank takes its micro-batch through the teacher too."""
    if teacher.offload:
        raise ConfigError(
            "teacher.offload: a term on whole distributions needs the teacher during updates; "
            "remove it"
        )
    if teacher.layout.context_parallel_size != student.context_parallel_size:
        raise ConfigError(
            "teacher.layout.context_parallel_size: must be the student's "
            f"{student.context_parallel_size} for a term on whole distributions"
        )


def _check_layout(name: str, model: ModelConfig, architecture: Architecture) -> None:
    layout = model.layout
    key = f"{name}.layout"
    tensor = layout.tensor_model_parallel_size
    split = {
        "attention heads": architecture.num_attention_heads,
        "key-value heads": architecture.num_key_value_heads,
        **({} if architecture.experts else {"intermediate size": architecture.intermediate_size}),
    }
    for quantity, size in split.items():
        if size % tensor:
            raise ConfigError(
                f"{key}.tensor_model_parallel_size: {tensor} does not divide the {size} {quantity} "
                f"of {model.path}"
            )
    _check_stages(key, model, architecture)
    _check_experts(name, model, architecture)
    if layout.sequence_parallel and tensor == 1:
        raise ConfigError(
            f"{key}.sequence_parallel: no effect with tensor_model_parallel_size=1; remove it"
        )


def _check_stages(key: str, model: ModelConfig, architecture: Architecture) -> None:
    stages = model.layout.pipeline_model_parallel_size
    chunks = model.layout.virtual_pipeline_model_parallel_size
    if architecture.num_layers % stages:
        raise ConfigError(
            f"{key}.pipeline_model_parallel_size: {stages} does not divide the "
            f"{architecture.num_layers} layers of {model.path}"
        )
    if chunks > 1 and stages == 1:
        raise ConfigError(
            f"{key}.virtual_pipeline_model_parallel_size: no effect without pipeline stages; "
            "remove it"
        )
    if architecture.num_layers % (stages * chunks):
        raise ConfigError(
            f"{key}.virtual_pipeline_model_parallel_size: {stages} stages of {chunks} chunks do "
            f"not divide the {architecture.num_layers} layers of {model.path}"
        )


def _check_experts(name: str, model: ModelConfig, architecture: Architecture) -> None:
    experts = architecture.experts
    layout = model.layout
    for size_key, quantity, whole in (
        ("expert_model_parallel_size", "experts", experts and experts.count),
        (
            "expert_tensor_parallel_size",
            "intermediate size of the experts",
            experts and experts.intermediate_size,
        ),
    ):
        key = f"{name}.layout.{size_key}"
        size = getattr(layout, size_key)
        if experts is None and size > 1:
            raise ConfigError(f"{key}: no effect, {model.path} has no experts; remove it")
        if whole and whole % size:
            raise ConfigError(
                f"{key}: {size} does not divide the {whole} {quantity} of {model.path}"
            )
    # a row is a multiple of 16 bytes, at 2 bytes a number
    if experts and experts.intermediate_size // layout.expert_tensor_parallel_size % 8:
        raise ConfigError(
            f"{name}.layout.expert_tensor_parallel_size: a rank's share of the intermediate size "
            f"{experts.intermediate_size} of the experts of {model.path} must be a multiple of 8, "
            "for grouped products"
        )
    whole_sequences = layout.tensor_model_parallel_size > 1 and not layout.sequence_parallel
    if experts and name == "student" and whole_sequences:
        raise ConfigError(
            f"{name}.layout.sequence_parallel: must be true to train experts with tensor "
            "parallelism"
        )


def _check_lengths(config: RunConfig) -> None:
    completion = config.rollout.max_completion_tokens
    longest = config.max_sequence_length
    if samples(config) and completion >= longest:
        raise ConfigError(
            f"rollout.max_completion_tokens: {completion} leaves no room for a prompt within "
            f"max_sequence_length={longest}"
        )
    _check_micro_batch(config)


def _check_micro_batch(config: RunConfig) -> None:
    tokens = config.train.micro_batch_tokens
    for name, model in config.models.items():
        longest = longest_read(config, name)
        ranks = model.layout.context_parallel_size
        if tokens * ranks < model.layout.padded_length(longest):
            shared = f" on the {name}'s {ranks} context-parallel ranks" if ranks > 1 else ""
            text = f" and skills.max_tokens={longest - config.max_sequence_length}"
            privileged = text if longest > config.max_sequence_length else ""
            raise ConfigError(
                f"train.micro_batch_tokens: {tokens} cannot hold a sequence of "
                f"max_sequence_length={config.max_sequence_length}{privileged}{shared}; raise it"
            )
    if process_reward(config.method) and config.student.layout.context_parallel_size > 1:
        raise ConfigError(
            "student.layout.context_parallel_size: a process reward is a sum over whole "
            "sequences; use tensor or pipeline parallelism"
        )


def _check_batch(config: RunConfig) -> None:
    prompts = config.rollout.num_prompts
    updates = config.train.updates_per_step
    if prompts % updates:
        raise ConfigError(
            f"train.updates_per_step: {updates} does not divide rollout.num_prompts={prompts}"
        )
