"""Checks of the keys of `data`, before a file is opened."""

import re

from megatron_opd.errors import ConfigError
from megatron_opd.recipe.keys import RunConfig, TemplateConfig
from megatron_opd.tasks.chat_template import OWN_VARIABLES

_NOT_A_LINE_BREAK = re.compile(r"\\[nt](?![a-zA-Z])")  # \ne and \tan are LaTeX


def check_data_keys(config: RunConfig) -> list[str]:
    """Refuses keys without effect, contradicting limits and line breaks that are none.

    Returns warnings. Raises ConfigError.
    """
    data = config.data
    template = data.template
    if template.kind == "raw" and template.system != TemplateConfig.system:
        raise ConfigError(
            "data.template.system: no effect with kind=raw; put it into data.template.text"
        )
    for key in ("chat_template", "chat_template_kwargs"):
        if template.kind == "raw" and getattr(template, key):
            raise ConfigError(f"data.template.{key}: no effect with kind=raw; remove it")
    reserved = sorted(OWN_VARIABLES & template.chat_template_kwargs.keys())
    if reserved:
        raise ConfigError(
            f"data.template.chat_template_kwargs.{reserved[0]}: every template is given it; remove "
            "it"
        )
    if any(not word for word in config.rollout.stop):
        raise ConfigError("rollout.stop: an empty text would end every completion; remove it")
    for key, has_another in (
        ("an environment", config.environment is not None),
        ("method.teacher_share", bool(config.method.teacher_share)),
    ):
        if config.rollout.stop and has_another:
            raise ConfigError(f"rollout.stop: does not go with {key}; remove it")
    if data.max_prompt_tokens is not None and data.max_prompt_tokens >= config.max_sequence_length:
        raise ConfigError(
            f"data.max_prompt_tokens: {data.max_prompt_tokens} is not below "
            f"max_sequence_length={config.max_sequence_length}; lower it, or remove it"
        )
    if _NOT_A_LINE_BREAK.search(template.prefill):
        raise ConfigError(
            f"data.template.prefill: {template.prefill} has a backslash and a letter where a line "
            "break is meant; in YAML that takes double quotes, on the command line '\"...\"' "
            "around the value"
        )
    if _NOT_A_LINE_BREAK.search(template.text):
        return [
            "data.template.text: has a backslash and a letter where a line break may be meant; in "
            "YAML that takes double quotes, on the command line '\"...\"' around the value"
        ]
    return []
