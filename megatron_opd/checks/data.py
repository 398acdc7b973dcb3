"""Checks of the keys of `data`, before a file is opened."""

import re

from megatron_opd.errors import ConfigError
from megatron_opd.recipe.data import DataConfig, TemplateConfig
from megatron_opd.recipe.keys import RunConfig
from megatron_opd.tasks.chat_template import OWN_VARIABLES

_NAME = re.compile(r"[\w-]+")
_NOT_A_LINE_BREAK = re.compile(r"\\[nt](?![a-zA-Z])")  # \ne and \tan are LaTeX


def check_data_keys(config: RunConfig) -> list[str]:
    """Refuses keys without effect, contradicting limits and line breaks that are none.

    Returns warnings. Raises ConfigError.
    """
    data = config.data
    _check_names(data)
    _check_stop(config)
    warnings = _check_template(data.template, "data.template")
    for name, one in data.sets.items():
        if one.template:
            warnings += _check_template(one.template, f"data.heldout_sets.{name}.template")
        if one.source and one.source_column:
            raise ConfigError(
                f"data.heldout_sets.{name}.source_column: no effect with source={one.source}; "
                "remove one"
            )
    if data.max_prompt_tokens is not None and data.max_prompt_tokens >= config.max_sequence_length:
        raise ConfigError(
            f"data.max_prompt_tokens: {data.max_prompt_tokens} is not below "
            f"max_sequence_length={config.max_sequence_length}; lower it, or remove it"
        )
    return warnings


def _check_names(data: DataConfig) -> None:
    """A mixture is in the place of data.train; names become parts of metrics and folders."""
    if data.mixture and data.train:
        raise ConfigError("data.train: no effect with data.mixture, whose parts have paths; remove")
    if data.mixture and not data.parts:
        raise ConfigError("data.mixture: every part is null; leave one, or give data.train")
    names = [("mixture", name) for name in data.mixture]
    names += [("heldout_sets", name) for name in data.heldout_sets]
    for key, name in names:
        if not _NAME.fullmatch(name) or (key, name) == ("heldout_sets", "with_skills"):
            raise ConfigError(
                f"data.{key}: {name!r} cannot be a name; use letters, digits, - and _"
            )


def _check_stop(config: RunConfig) -> None:
    stop = config.rollout.stop
    if any(not word for word in stop):
        raise ConfigError("rollout.stop: an empty text would end every completion; remove it")
    if stop and config.environment is not None:
        raise ConfigError("rollout.stop: does not go with an environment; remove it")
    if stop and config.method.teacher_share:
        raise ConfigError("rollout.stop: does not go with method.teacher_share; remove it")


def _check_template(template: TemplateConfig, key: str) -> list[str]:
    if template.kind == "raw" and template.system != TemplateConfig.system:
        raise ConfigError(f"{key}.system: no effect with kind=raw; put it into {key}.text")
    for name in ("chat_template", "chat_template_kwargs"):
        if template.kind == "raw" and getattr(template, name):
            raise ConfigError(f"{key}.{name}: no effect with kind=raw; remove it")
    reserved = sorted(OWN_VARIABLES & template.chat_template_kwargs.keys())
    if reserved:
        raise ConfigError(
            f"{key}.chat_template_kwargs.{reserved[0]}: every template is given it; remove it"
        )
    if _NOT_A_LINE_BREAK.search(template.prefill):
        raise ConfigError(
            f"{key}.prefill: {template.prefill} has a backslash and a letter where a line "
            "break is meant; in YAML that takes double quotes, on the command line '\"...\"' "
            "around the value"
        )
    if _NOT_A_LINE_BREAK.search(template.text):
        return [
            f"{key}.text: has a backslash and a letter where a line break may be meant; in "
            "YAML that takes double quotes, on the command line '\"...\"' around the value"
        ]
    return []
