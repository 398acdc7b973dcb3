"""Checks of a recipe whose tasks are an environment's, and of one whose tasks are data."""

from dataclasses import fields

from megatron_opd.environments.check import check_environment
from megatron_opd.errors import ConfigError
from megatron_opd.methods.needs import needs_of
from megatron_opd.recipe.agents import EnvironmentConfig, HistoryConfig, SkillsConfig
from megatron_opd.recipe.data import DataConfig
from megatron_opd.recipe.keys import RunConfig
from megatron_opd.recipe.rewards import RewardConfig

# Keys of data that shape an environment's prompts, or say nothing of files.
_SHARED_KEYS = ("template", "shuffle", "sha256")


def check_tasks(config: RunConfig) -> None:
    """The recipe says where its tasks are from, and nothing of the other kind.

    Raises ConfigError naming the key.
    """
    if config.environment is None:
        _check_data_alone(config)
        return
    environment = config.environment
    _check_no_data(config, environment)
    _check_method(config)
    _check_history(environment.history)
    check_environment(environment)
    if config.skills:
        _check_skills(config, config.skills)
    if config.eval and config.eval.skills != "without" and config.skills is None:
        raise ConfigError(
            f"eval.skills: {config.eval.skills} needs skills; give skills.bank, or remove it"
        )


def _check_data_alone(config: RunConfig) -> None:
    if not (config.data.train or config.data.mixture):
        raise ConfigError(
            "data.train: missing; give the file of the training prompts, or an environment"
        )
    if config.skills:
        raise ConfigError("skills: needs an environment; remove it, or give environment.kind")
    if config.eval and config.eval.skills != "without":
        raise ConfigError("eval.skills: no effect without an environment; remove it")


def _check_no_data(config: RunConfig, environment: EnvironmentConfig) -> None:
    """Keys of data files and of verifiers must keep their defaults."""
    usual = DataConfig()
    for field in fields(DataConfig):
        changed = getattr(config.data, field.name) != getattr(usual, field.name)
        if changed and field.name not in _SHARED_KEYS:
            raise ConfigError(
                f"data.{field.name}: no effect, the tasks are those of environment "
                f"{environment.kind}; remove it"
            )
    usual_reward = RewardConfig()
    for field in fields(RewardConfig):
        if getattr(config.reward, field.name) != getattr(usual_reward, field.name):
            raise ConfigError(
                f"reward.{field.name}: no effect, the environment {environment.kind} gives the "
                "rewards; set environment.reward, or remove it"
            )


def _check_method(config: RunConfig) -> None:
    """Refuses what a method does with the data's traces, or with tokens that a teacher draws."""
    method = config.method
    needs = needs_of(method)
    if needs.traces:
        raise ConfigError(
            f"method: {method.name} reads traces, which an environment has none of; choose another"
        )
    if method.teacher_share:
        raise ConfigError(
            "method.teacher_share: does not go with an environment; choose another method"
        )
    if not needs.rollouts:
        raise ConfigError(
            f"method: {method.name} samples nothing, so an environment has no effect; remove it"
        )


def _check_history(history: HistoryConfig) -> None:
    usual = HistoryConfig()
    other = "length" if history.kind == "growing" else "observations"
    if getattr(history, other) != getattr(usual, other):
        raise ConfigError(
            f"environment.history.{other}: no effect with kind={history.kind}; remove it"
        )


def _check_skills(config: RunConfig, skills: SkillsConfig) -> None:
    if skills.exploration != SkillsConfig.exploration and skills.retrieval != "ucb":
        raise ConfigError(
            f"skills.exploration: no effect with retrieval={skills.retrieval}; remove it"
        )
    if skills.place == "system" and config.data.template.kind == "raw":
        raise ConfigError(
            "skills.place: a raw template has no system message; choose user or raw_prefix"
        )
