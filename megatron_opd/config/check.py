"""What a recipe alone and its model directories can get wrong, found before torch is imported.

Every problem is one ConfigError or DataError that names the key or the file and the remedy.
"""

import math
import tempfile
from dataclasses import fields
from pathlib import Path

from megatron_opd.config.architecture import Architecture, architecture_of
from megatron_opd.config.check_method import check_method
from megatron_opd.config.methods import CATALOGUE
from megatron_opd.config.model_files import check_vocabulary, check_weights, common_vocabulary, end_tokens
from megatron_opd.config.plan import plan
from megatron_opd.config.schema import (
    EvalConfig,
    ModelConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    TemplateConfig,
)
from megatron_opd.errors import ConfigError


def preflight(config: RunConfig, *, world_size: int | None) -> list[str]:
    """Checks everything but the data and the run directory; returns warnings.

    `world_size` is the number of processes the run will have, None where that is not known yet.
    Raises: ConfigError (a key), DataError (a model directory).
    """
    warnings = check_method(config)
    _check_settings_have_effect(config)
    architectures = _check_directories(config)
    warnings += check_sizes(config, architectures, world_size=world_size)
    warnings += _compare_models(config)
    if config.num_steps <= config.train.optimizer.warmup_steps:
        warnings.append("train.optimizer.warmup_steps: the warm-up does not end within num_steps")
    return warnings


def check_sizes(
    config: RunConfig, architectures: dict[str, Architecture], *, world_size: int | None
) -> list[str]:  # fmt: skip
    """Whether layouts, lengths, vocabularies and batches divide and fit; needs no model directory. Returns warnings.

    `architectures` is that of the "student" and, where there is one, of the "teacher". Raises ConfigError.
    """
    for name, model in _models(config):
        _check_layout(name, model, architectures[name])
    for name, architecture in architectures.items():
        longest = architecture.max_position_embeddings
        if config.max_sequence_length > longest:
            raise ConfigError(
                f"max_sequence_length: {config.max_sequence_length} is more than the {name}'s "
                f"max_position_embeddings={longest}"
            )
    warnings = _check_vocabularies(config, architectures)
    _check_lengths(config)
    _check_batch(config)
    if world_size is not None:
        _check_processes(config, world_size)
    return warnings


def check_run_directory(config: RunConfig, *, resume: bool) -> None:
    """The run's directory must be new (or, to resume, a run) and writable. Raises ConfigError naming run_dir."""
    directory = Path(config.directory)
    if resume and not (directory / "config.yaml").is_file():
        raise ConfigError(f"run_dir: {directory} holds no run to resume; leave out --resume, or give run_dir=...")
    if not resume and directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigError(f"run_dir: {directory} exists already; use --resume to go on with it, or run_dir=...")
    parent = next(each for each in (directory, *directory.absolute().parents) if each.exists())
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise ConfigError(f"run_dir: cannot write {directory} ({error.strerror}); choose another run_dir=...") from None


def processes_needed(config: RunConfig) -> int:
    """Every layout's TP x PP, and EP x PP, divides the number of processes: their least common multiple."""
    return math.lcm(*(size for _, model in _models(config) for size in _sizes(model)))


def _models(config: RunConfig) -> list[tuple[str, ModelConfig]]:
    teacher = [("teacher", config.teacher)] if config.teacher else []
    return [("student", config.student), *teacher]


def _sizes(model: ModelConfig) -> tuple[int, int]:
    layout = model.layout
    return (_model_parallel_size(model), layout.expert_model_parallel_size * layout.pipeline_model_parallel_size)


def _model_parallel_size(model: ModelConfig) -> int:
    return model.layout.tensor_model_parallel_size * model.layout.pipeline_model_parallel_size


def _check_settings_have_effect(config: RunConfig) -> None:
    needs = plan(config.method)
    if not needs.rollouts:
        _check_nothing_sampled(config)
    if not needs.traces and config.data.trace_column != "auto":
        raise ConfigError(f"data.trace_column: no effect, method {config.method.name} reads no traces; remove it")
    template, optimizer = config.data.template, config.train.optimizer
    if template.kind == "raw" and template.system != TemplateConfig.system:
        raise ConfigError("data.template.system: no effect with kind=raw; put it into data.template.text")
    if optimizer.min_lr > 0 and optimizer.schedule == "constant":
        raise ConfigError("train.optimizer.min_lr: no effect with schedule=constant; choose linear or cosine")
    if optimizer.min_lr > optimizer.lr:
        raise ConfigError(f"train.optimizer.min_lr: {optimizer.min_lr} is above train.optimizer.lr={optimizer.lr}")
    for key in ("adam_beta1", "adam_beta2"):
        if getattr(optimizer, key) == 1:
            raise ConfigError(f"train.optimizer.{key}: must be below 1")
    if config.eval:
        _check_eval(config.eval, config.data.heldout)


def _check_nothing_sampled(config: RunConfig) -> None:
    """Supervised methods sample only to evaluate: keys of the rollouts and the reward must keep their defaults."""
    unused = ["rollout.temperature"] if config.eval else [f"rollout.{each.name}" for each in fields(RolloutConfig)]
    unused += [] if config.eval else [f"reward.{each.name}" for each in fields(RewardConfig)]
    for key in unused:
        section, name = key.split(".")
        given = getattr(getattr(config, section), name)
        one_trace_per_prompt = key == "rollout.samples_per_prompt" and given == 1
        default = getattr(RolloutConfig if section == "rollout" else RewardConfig, name)
        if name != "num_prompts" and given != default and not one_trace_per_prompt:
            raise ConfigError(f"{key}: no effect, method {config.method.name} samples nothing; remove it")


def _check_eval(evaluation: EvalConfig, heldout: str | None) -> None:
    if heldout is None:
        raise ConfigError("eval: needs data.heldout, the file of held-out prompts; give it, or set eval=null")
    if evaluation.temperature == 0 and evaluation.samples_per_prompt > 1:
        raise ConfigError("eval.samples_per_prompt: greedy samples are all equal; raise eval.temperature, or set 1")
    if evaluation.temperature == 0 and evaluation.top_p < 1:
        raise ConfigError("eval.top_p: no effect with eval.temperature=0; remove it")
    if evaluation.top_p == 0:
        raise ConfigError("eval.top_p: must be above 0")


def _check_directories(config: RunConfig) -> dict[str, Architecture]:
    """The architectures in the models' directories, which must hold weights and a tokenizer that fits."""
    architectures = {}
    for name, model in _models(config):
        architectures[name] = architecture_of(model)
        check_weights(Path(model.path))
        check_vocabulary(Path(model.path), architectures[name].vocab_size)
    return architectures


def _compare_models(config: RunConfig) -> list[str]:
    """What teacher and student do not have in common and the run can live with."""
    if config.teacher is None:
        return []
    student, teacher = Path(config.student.path), Path(config.teacher.path)
    common, warnings = common_vocabulary(student, teacher), []
    if common is not None:
        warnings.append(
            f"teacher.path: student and teacher share their first {common} ids; the others never become targets"
        )
    if config.method.teacher_share and common is not None:
        raise ConfigError("method.teacher_share: needs a teacher with the student's vocabulary; theirs differ")
    mine, theirs = end_tokens(student), end_tokens(teacher)
    if mine and theirs and not mine & theirs:
        warnings.append(
            f"teacher.path: ends a response with {sorted(theirs)}, the student with {sorted(mine)}: there it teaches "
            "what the student must not learn; give the terms that read it a gate {kind: not_end}"
        )
    return warnings


def _check_vocabularies(config: RunConfig, architectures: dict[str, Architecture]) -> list[str]:
    method, sizes = config.method, {name: each.vocab_size for name, each in architectures.items()}
    needs, smallest = plan(method), min(sizes.values())
    if needs.teacher_head and len(set(sizes.values())) > 1:
        raise ConfigError(
            f"teacher.path: its vocabulary has {sizes['teacher']} rows, the student's {sizes['student']}; a term on "
            "whole distributions needs them equal"
        )
    if needs.topk <= smallest:
        return []
    if method.name in CATALOGUE and plan(CATALOGUE[method.name].method).topk == needs.topk:
        return [f"method: the top {needs.topk} of {method.name} are all {smallest} tokens of this vocabulary"]
    readers = [name for name, term in method.terms.items() if getattr(term, "k", 0) > smallest]
    key = f"method.{readers[0]}.k" if readers else "method"
    raise ConfigError(f"{key}: {needs.topk} is more than the {smallest} tokens of the vocabulary")


def _check_layout(name: str, model: ModelConfig, architecture: Architecture) -> None:
    layout, key = model.layout, f"{name}.layout"
    tensor, pipeline = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    split = {
        "attention heads": architecture.num_attention_heads,
        "key-value heads": architecture.num_key_value_heads,
        **({} if architecture.experts else {"intermediate size": architecture.intermediate_size}),
    }
    for what, size in split.items():
        if size % tensor:
            raise ConfigError(
                f"{key}.tensor_model_parallel_size: {tensor} does not divide the {size} {what} of {model.path}"
            )
    if architecture.num_layers % pipeline:
        raise ConfigError(
            f"{key}.pipeline_model_parallel_size: {pipeline} does not divide the "
            f"{architecture.num_layers} layers of {model.path}"
        )
    _check_experts(name, model, architecture)
    if layout.sequence_parallel and tensor == 1:
        raise ConfigError(f"{key}.sequence_parallel: no effect with tensor_model_parallel_size=1; remove it")


def _check_experts(name: str, model: ModelConfig, architecture: Architecture) -> None:
    experts, size = architecture.experts, model.layout.expert_model_parallel_size
    key = f"{name}.layout.expert_model_parallel_size"
    if experts is None and size > 1:
        raise ConfigError(f"{key}: no effect, {model.path} has no experts; remove it")
    if experts and experts.count % size:
        raise ConfigError(f"{key}: {size} does not divide the {experts.count} experts of {model.path}")
    if experts and name == "student":
        raise ConfigError(f"student.path: {model.path} is a mixture of experts, which only the teacher can be so far")


def _check_lengths(config: RunConfig) -> None:
    samples = plan(config.method).rollouts or config.eval is not None
    completion, longest = config.rollout.max_completion_tokens, config.max_sequence_length
    if samples and completion >= longest:
        raise ConfigError(
            f"rollout.max_completion_tokens: {completion} leaves no room for a prompt within "
            f"max_sequence_length={longest}"
        )


def _check_batch(config: RunConfig) -> None:
    prompts, updates = config.rollout.num_prompts, config.train.updates_per_step
    if prompts % updates:
        raise ConfigError(f"train.updates_per_step: {updates} does not divide rollout.num_prompts={prompts}")


def _check_processes(config: RunConfig, world_size: int) -> None:
    needed = processes_needed(config)
    widest, model = max(_models(config), key=lambda named: max(_sizes(named[1])))
    layout = model.layout
    if world_size % needed:
        sizes = f"TP {layout.tensor_model_parallel_size} x PP {layout.pipeline_model_parallel_size}"
        if layout.expert_model_parallel_size > 1:
            sizes += f" with EP {layout.expert_model_parallel_size}"
        at_least = "at least" if world_size < needed else "a multiple of"
        rounded = max(needed, world_size // needed * needed)
        raise ConfigError(
            f"{widest}.layout: {sizes} needs {at_least} {needed} processes, there would be {world_size}; "
            f"add --nproc {rounded}"
        )
    data_parallel = world_size // _model_parallel_size(config.student)
    method = config.method
    samples = config.rollout.samples_per_prompt + method.traces_per_group if plan(method).rollouts else 1
    sequences = config.rollout.num_prompts // config.train.updates_per_step * samples
    if sequences % data_parallel:
        raise ConfigError(
            f"rollout.num_prompts: the {sequences} sequences of an update do not divide among the student's "
            f"{data_parallel} data-parallel replicas; make them a multiple"
        )
