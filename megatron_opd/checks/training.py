"""Every check that can be made before a process group or a device is touched.

Imports no torch itself.
"""

from pathlib import Path

from megatron_opd.checks.hub import with_local_models
from megatron_opd.checks.recipe import check_run_directory, preflight
from megatron_opd.checks.rewards import check_rewarded, unknown_sources
from megatron_opd.checks.skill_texts import check_skill_texts
from megatron_opd.contracts.rows import Task
from megatron_opd.errors import ConfigError, DataError
from megatron_opd.files.manifest import checkpoint_steps, find_damage
from megatron_opd.files.typed import differences
from megatron_opd.methods.needs import needs_of
from megatron_opd.recipe.agents import EnvironmentConfig
from megatron_opd.recipe.keys import RunConfig
from megatron_opd.recipe.load import load_config
from megatron_opd.suites.asking import prompts_of, suites_in
from megatron_opd.tasks.data import load_heldout, load_training
from megatron_opd.tasks.data_files import shown
from megatron_opd.tasks.pin import check_unchanged
from megatron_opd.tasks.prompter import TemplatePrompter, WordsReader
from megatron_opd.tasks.template import check_chat_template
from megatron_opd.tasks.tokenizer import Tokenizer, tokenizer_for_checks
from megatron_opd.verify.graders.open import check_grader

# Keys that a resumed run may change.
RESUMABLE = (
    "num_steps",
    "checkpoint",
    "log",
    "eval",
    "run_dir",
    "student.layout",
    "teacher.layout",
    "rollout.processes",
    "teacher.processes",
    "train.micro_batch_tokens",
    "train.recompute_granularity",
    "train.fused_output_layer",
)


def check_recipe(config: RunConfig, *, world_size: int | None) -> list[str]:
    """Checks the recipe, the model directories and the data files.

    Returns warnings. Raises ConfigError, DataError.
    """
    config = with_local_models(config)
    warnings = preflight(config, world_size=world_size)
    check_skill_texts(config)
    return warnings + check_data(config)


def check_data(config: RunConfig) -> list[str]:
    """Reads the data files as the run will. Returns warnings. Raises ConfigError, DataError."""
    tokenizer = tokenizer_for_checks(config.student.path)
    if config.environment:
        _check_prompts(config, config.environment, tokenizer)
        return _check_suites(config, tokenizer)
    needs = needs_of(config.method)
    check_unchanged(config)
    warnings: list[str] = []
    parts = load_training(
        config, tokenizer, need_answer=needs.rewards, need_trace=needs.traces, warn=warnings.append
    )
    tasks = [task for of_part in parts.values() for task in of_part]
    sets = load_heldout(config, tokenizer, warn=warnings.append)
    for name, of_part in parts.items():
        key = f"data.mixture.{name}" if name else "data.train"
        if needs.rollouts:
            warnings += _room_for_completions(config, of_part, key)
        if needs.rewards:
            warnings += check_rewarded(config, of_part, key)
    if config.eval:
        warnings += _check_suites(config, tokenizer)
    for name, heldout in sets.items():
        key = f"data.heldout_sets.{name}" if name else "data.heldout"
        if config.eval:
            warnings += _room_for_completions(config, heldout, key)
        warnings += check_rewarded(config, heldout, key) + _in_both(tasks, heldout, key)
    heldout_tasks = [task for heldout in sets.values() for task in heldout]
    warnings += unknown_sources(config, [*tasks, *heldout_tasks])
    if len(tasks) < config.rollout.num_prompts:
        warnings.append(
            f"rollout.num_prompts: one step takes more prompts than the {len(tasks)} of "
            f"{_train_of(config)}"
        )
    elif config.method.max_refills and len(tasks) < 2 * config.rollout.num_prompts:
        warnings.append(
            f"method.max_refills: the {len(tasks)} prompts of {_train_of(config)} are "
            "fewer than two steps take, so a step's refills draw its prompts again, for further "
            "samples"
        )
    return warnings


def _check_suites(config: RunConfig, tokenizer: Tokenizer) -> list[str]:
    """The suites' data are there, every prompt has room, and answers can be judged here. Raises
    ConfigError, DataError."""
    warnings: list[str] = []
    read = WordsReader(config.data.template, tokenizer)
    for suite, _ in suites_in(config, warnings.append):
        check_grader(suite.protocol)
        prompts_of(suite, read, context=config.max_sequence_length, seed=config.seed)
    return warnings


def _check_prompts(config: RunConfig, environment: EnvironmentConfig, tokenizer: Tokenizer) -> None:
    """The template suits an environment's prompts. Raises ConfigError, DataError."""
    if config.data.template.kind == "chat":
        check_chat_template(config.data.template, tokenizer)
    bare = environment.history.observations == "text"
    if environment.grows:
        TemplatePrompter(config.data.template, tokenizer, "user", bare=bare).check_growing()


def _room_for_completions(config: RunConfig, tasks: list[Task], key: str) -> list[str]:
    """Counts the prompts that leave less room than rollout.max_completion_tokens."""
    completion = config.rollout.max_completion_tokens
    lengths = [len(task.prompt_ids) for task in tasks]
    cut = sum(length + completion > config.max_sequence_length for length in lengths)
    if not cut:
        return []
    return [
        f"data.max_prompt_tokens: {cut} of {len(tasks)} prompts of {key} leave no room for "
        f"rollout.max_completion_tokens={completion} within "
        f"max_sequence_length={config.max_sequence_length}; the longest has {max(lengths)} tokens "
        f"and leaves {config.max_sequence_length - max(lengths)}"
    ]


def _train_of(config: RunConfig) -> str:
    return "data.mixture" if config.data.parts else shown(config.data.train)


def _in_both(tasks: list[Task], heldout: list[Task], key: str) -> list[str]:
    """Counts the held-out prompts that the run trains on."""
    texts = {task.text for task in tasks}
    count = sum(task.text in texts for task in heldout)
    if not count:
        return []
    return [f"{key}: {count} of {len(heldout)} prompts are in data.train too"]


def check_resumed(config: RunConfig) -> None:
    """A resumed run keeps its recipe, and has a checkpoint unless it was stopped before its first.

    `config`: with what the run has pinned (`start.to_resume`).

    Raises ConfigError naming the key that differs from the stored one, DataError where all
    checkpoints are damaged.
    """
    stored_file = Path(config.directory) / "config.yaml"
    check_run_directory(config, resume=True)
    stored = load_config(str(stored_file))
    changed = [key for key in differences(stored, config) if not _may_change(key)]
    if changed:
        may = ", ".join(key for key in RESUMABLE if key != "run_dir")
        raise ConfigError(
            f"{changed[0]}: differs from {stored_file}; a resumed run may change only {may}"
        )
    done = checkpoint_steps(Path(config.directory) / "checkpoints")
    problems = [find_damage(path, contents=False) for path in done.values()]
    if done and all(problems):
        raise DataError(
            f"{done[max(done)]}: {problems[-1]}; no whole checkpoint is left: bring one back, or "
            "start again with another run_dir"
        )
    if done and config.num_steps < max(done):
        earlier = [step for step in done if step <= config.num_steps]
        weights = done[max(earlier)] if earlier else f"{config.directory}/checkpoints/step-NNNNNN"
        raise ConfigError(
            f"num_steps: {config.num_steps} is below the {max(done)} steps that {config.directory} "
            f"has done; give num_steps={max(done)} or more (the weights of an earlier step: "
            f"megatron-opd convert {weights} OUT)"
        )


def _may_change(key: str) -> bool:
    return any(f"{key}.".startswith(f"{resumable}.") for resumable in RESUMABLE)
