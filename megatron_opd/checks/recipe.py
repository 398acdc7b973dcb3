"""Checks of a recipe and its model directories, before torch is imported.

Every problem is one ConfigError or DataError that names the key or the file and the remedy.
"""

import tempfile
from dataclasses import fields
from pathlib import Path

from megatron_opd.architectures.architecture import Architecture, architecture_of, read_config
from megatron_opd.architectures.config_keys import unknown_keys
from megatron_opd.architectures.directory import check_vocabulary, common_vocabulary
from megatron_opd.architectures.ends import read_ends, student_ends_note, teacher_ends_note
from megatron_opd.checks.data import check_data_keys
from megatron_opd.checks.environment import check_tasks
from megatron_opd.checks.method import check_method
from megatron_opd.checks.rewards import check_reward_keys
from megatron_opd.checks.sizes import check_sizes
from megatron_opd.errors import ConfigError
from megatron_opd.files.lock import RUN_LOCK
from megatron_opd.files.own_code import checked_own
from megatron_opd.methods.needs import needs_of
from megatron_opd.recipe.keys import (
    EvalConfig,
    LossScaleConfig,
    RolloutConfig,
    RunConfig,
)
from megatron_opd.recipe.rewards import RewardConfig
from megatron_opd.weights.check import check_weights

# files that a process may leave when it is killed before its run begins
_NOTHING_YET = {RUN_LOCK, "config.yaml.tmp"}


def preflight(config: RunConfig, *, world_size: int | None) -> list[str]:
    """Checks everything but the data and the run directory; returns warnings.

    `world_size` is the number of processes the run will have, None where that is not known yet.
    Raises: ConfigError (a key), DataError (a model directory).
    """
    warnings = check_method(config)
    check_tasks(config)
    _check_settings_have_effect(config)
    warnings += check_data_keys(config)
    architectures = _check_directories(config)
    warnings += check_sizes(config, architectures, world_size=world_size)
    warnings += _unknown_keys(config) + _compare_models(config, architectures)
    if config.num_steps <= config.train.optimizer.warmup_steps:
        warnings.append("train.optimizer.warmup_steps: the warm-up does not end within num_steps")
    return warnings


def check_run_directory(config: RunConfig, *, resume: bool) -> None:
    """The run's directory must be writable and new, or, to resume, a run.

    A directory is a run from its config.yaml on, the first file that is written. Raises
    ConfigError naming run_dir.
    """
    directory = Path(config.directory)
    if "\0" in config.directory:
        raise ConfigError(
            f"run_dir: {config.directory!r} holds a null character; choose another run_dir=..."
        )
    is_run = (directory / "config.yaml").is_file()
    others: list[str] = []
    if directory.is_dir():
        others = sorted({path.name for path in directory.iterdir()} - _NOTHING_YET)
    if others and not is_run:
        raise ConfigError(
            f"run_dir: {directory} exists already and is no run: it has {others[0]} and no "
            "config.yaml; give another run_dir=..., or empty it"
        )
    if resume and not is_run:
        raise ConfigError(
            f"run_dir: {directory} holds no run to resume; leave out --resume, or give run_dir=..."
        )
    if not resume and is_run:
        raise ConfigError(
            f"run_dir: {directory} exists already; use --resume to go on with it, or run_dir=..."
        )
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"run_dir: {directory} is a file; give another run_dir=...")
    folders = (directory, *directory.absolute().parents)
    parent = next(folder for folder in folders if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise ConfigError(
            f"run_dir: cannot write {directory} ({error.strerror}); choose another run_dir=..."
        ) from None


def _check_settings_have_effect(config: RunConfig) -> None:
    needs = needs_of(config.method)
    if not needs.rollouts:
        _check_nothing_sampled(config)
    if not needs.traces and config.data.trace_column != "auto":
        raise ConfigError(
            f"data.trace_column: no effect, method {config.method.name} reads no traces; remove it"
        )
    optimizer = config.train.optimizer
    _check_loss_scale(config)
    if optimizer.min_lr > 0 and optimizer.schedule == "constant":
        raise ConfigError(
            "train.optimizer.min_lr: no effect with schedule=constant; choose linear or cosine"
        )
    if optimizer.min_lr > optimizer.lr:
        raise ConfigError(
            f"train.optimizer.min_lr: {optimizer.min_lr} is above train.optimizer.lr={optimizer.lr}"
        )
    for key in ("adam_beta1", "adam_beta2"):
        if getattr(optimizer, key) == 1:
            raise ConfigError(f"train.optimizer.{key}: must be below 1")
    check_reward_keys(config)
    if config.rollout.engine != "vllm":
        checked_own("rollout.engine", config.rollout.engine, "Class", beside="vllm or ")
    if config.eval:
        has_heldout = bool(config.data.heldout_set or config.data.sets or config.environment)
        _check_eval(config.eval, has_heldout=has_heldout)
        for name in config.data.sets:
            _check_sampling(config.evaluation_of(name), f"data.heldout_sets.{name}")


def _check_loss_scale(config: RunConfig) -> None:
    scale = config.train.loss_scale
    for key in fields(LossScaleConfig):
        if config.precision != "float16" and getattr(scale, key.name) != key.default:
            raise ConfigError(
                f"train.loss_scale.{key.name}: no effect with precision={config.precision}; "
                "remove it"
            )
    if scale.minimum > scale.initial:
        raise ConfigError(
            f"train.loss_scale.minimum: {scale.minimum} is above "
            f"train.loss_scale.initial={scale.initial}"
        )


def _check_nothing_sampled(config: RunConfig) -> None:
    """Keys of rollouts and reward must keep their defaults where a method samples nothing.

    Such a method samples only to evaluate. Raises ConfigError.
    """
    unused = ["rollout.temperature"]
    if not config.eval:
        unused = [f"rollout.{field.name}" for field in fields(RolloutConfig)]
        unused += [f"reward.{field.name}" for field in fields(RewardConfig)]
    for key in unused:
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        one_trace_per_prompt = key == "rollout.samples_per_prompt" and value == 1
        default = getattr(RolloutConfig() if section == "rollout" else RewardConfig(), name)
        if name != "num_prompts" and value != default and not one_trace_per_prompt:
            raise ConfigError(
                f"{key}: no effect, method {config.method.name} samples nothing; remove it"
            )


def _check_eval(evaluation: EvalConfig, *, has_heldout: bool) -> None:
    if not has_heldout and not any(evaluation.suites.values()):
        raise ConfigError(
            "eval: needs data.heldout, the file of held-out prompts, or eval.suites; give one, or "
            "set eval=null"
        )
    _check_sampling(evaluation, "eval")
    if evaluation.temperature == 0 and evaluation.top_p < 1:
        raise ConfigError("eval.top_p: no effect with eval.temperature=0; remove it")
    if evaluation.top_p == 0:
        raise ConfigError("eval.top_p: must be above 0")


def _check_sampling(evaluation: EvalConfig, key: str) -> None:
    if 0 < evaluation.temperature < 0.01 or evaluation.temperature > 2:
        raise ConfigError(
            f"{key}.temperature: {evaluation.temperature:g} must be 0 (greedy), or from 0.01 to 2"
        )
    if evaluation.temperature == 0 and evaluation.samples_per_prompt > 1:
        raise ConfigError(
            f"{key}.samples_per_prompt: greedy samples are all equal; raise {key}.temperature, or "
            "set 1"
        )


def _check_directories(config: RunConfig) -> dict[str, Architecture]:
    """The architectures of the models, whose directories hold weights and a fitting tokenizer."""
    architectures = {}
    for name, model in config.models.items():
        directory = Path(model.path)
        architecture = architecture_of(model)
        # The student's engine gets its weights from the trainer.
        sampled = name == "teacher" and bool(config.method.teacher_share)
        check_weights(directory, architecture, sampled=sampled)
        check_vocabulary(directory, architecture.vocab_size)
        architectures[name] = architecture
    return architectures


def _unknown_keys(config: RunConfig) -> list[str]:
    warnings = []
    for name, model in config.models.items():
        keys = unknown_keys(read_config(model.path))
        if keys:
            warnings.append(
                f"{name}.path: {model.path}/config.json has {', '.join(keys)}, which nothing here "
                "reads; if that changes what the model computes, this run computes something else"
            )
    return warnings


def _compare_models(config: RunConfig, architectures: dict[str, Architecture]) -> list[str]:
    """Warnings of differences between the models, or the files of one, that a run can live with."""
    read_ends(config.student.path)  # a student that never stops is refused
    warnings = student_ends_note(config.student.path)
    if config.teacher is None:
        return warnings
    student = Path(config.student.path)
    teacher = Path(config.teacher.path)
    common = common_vocabulary(student, teacher)
    if common is not None:
        warnings.append(
            f"teacher.path: student and teacher share their first {common} ids; the others never "
            "become targets"
        )
    if config.method.teacher_share and common is not None:
        raise ConfigError(
            "method.teacher_share: needs a teacher with the student's vocabulary; theirs differ"
        )
    if (
        config.method.teacher_share
        and architectures["teacher"].experts
        and not architectures["student"].experts
    ):
        raise ConfigError(
            "method.teacher_share: vLLM cannot sample from a mixture of experts beside a dense "
            "student"
        )
    return warnings + teacher_ends_note(student, teacher)
