"""The text that a model reads, made of a problem."""

import functools
import re
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from megatron_opd.errors import ConfigError, DataError
from megatron_opd.recipe.data import TemplateConfig
from megatron_opd.recipe.system_messages import SYSTEM_MESSAGES
from megatron_opd.tasks.chat_template import OWN_VARIABLES, ChatTemplate, only_template
from megatron_opd.tasks.messages import Message
from megatron_opd.tasks.tokenizer import Tokenizer

_OPEN_TAG = re.compile(r"<(think|thinking|thought|reasoning)>\s*$")


def render(
    template: TemplateConfig, tokenizer: Tokenizer, problem: str, before: Sequence[Message] = ()
) -> str:
    """The prompt text of a problem, which ends where the model's completion starts.

    `before` are the messages ahead of the problem, in a chat; a system message among them replaces
    `template.system`. Raises DataError when the tokenizer has no chat template, when it fails on
    the messages, and for messages without a template. Raises ConfigError when the template already
    ends with `template.prefill`.
    """
    # Not str.format, because problems are full of braces.
    text = template.text.replace("{problem}", problem)
    if template.kind == "raw":
        if before:
            roles = ", ".join(str(message["role"]) for message in before)
            raise DataError(
                f"the prompt has messages ahead of the problem ({roles}); set "
                "data.template.kind=chat"
            )
        return text + template.prefill
    problem_message: Message = {"role": "user", "content": text}
    messages = [*system_message(template, before), *before, problem_message]
    return render_messages(template, tokenizer, messages)


def render_messages(
    template: TemplateConfig, tokenizer: Tokenizer, messages: Sequence[Message]
) -> str:
    """The text of a conversation in a chat, as `render` gives it. Raises what that raises."""
    chat_template = chat_template_of(template, tokenizer)
    text = chat_template.render(messages, template.date or date.today())
    _check_prefill(template.prefill, text, chat_template.source)
    _check_characters(text, chat_template.source)
    return text + template.prefill


def chat_template_of(template: TemplateConfig, tokenizer: Tokenizer) -> ChatTemplate:
    """The recipe's chat template, or that of a tokenizer. Raises DataError when there is none."""
    source = template.chat_template or tokenizer.name_or_path
    if template.chat_template:
        text = _read_template(template.chat_template)
    else:
        text = only_template(tokenizer.chat_template, source)
    special_tokens = tokenizer.special_tokens_map
    return ChatTemplate(source, text, special_tokens, template.chat_template_kwargs)


def check_chat_template(template: TemplateConfig, tokenizer: Tokenizer) -> None:
    """The chat template is there, and reads what the recipe hands it. Raises ConfigError,
    DataError."""
    chat_template = chat_template_of(template, tokenizer)
    read = chat_template.variables()
    for name in template.chat_template_kwargs:
        if name not in read:
            others = ", ".join(sorted(read - OWN_VARIABLES - chat_template.special_tokens.keys()))
            raise ConfigError(
                f"data.template.chat_template_kwargs.{name}: no effect, the chat template of "
                f"{chat_template.source} does not read it; it reads {others or 'nothing beside'}"
            )


@functools.lru_cache(maxsize=8)
def _read_template(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        cause = getattr(error, "strerror", None) or "not UTF-8"
        raise ConfigError(
            f"data.template.chat_template: {path} cannot be read ({cause}); name a Jinja file"
        ) from None


def system_text(template: TemplateConfig) -> str | None:
    """The recipe's system message, in full; None without one."""
    if template.system is None:
        return None
    return SYSTEM_MESSAGES.get(template.system, template.system)


def without_opening(trace: str, prompt: str, prefill: str) -> str:
    """A trace without the words that its prompt already ends with.

    These are the recipe's prefill, or the tag with which the chat template opens the response, such
    as `<think>`.
    """
    tag = _OPEN_TAG.search(prompt)
    opening = tag.group() if tag else ""
    for start in (prefill, opening, opening.rstrip()):
        if start and trace.startswith(start):
            return trace.removeprefix(start)
    return trace


def system_message(template: TemplateConfig, before: Sequence[Message] = ()) -> list[Message]:
    """The recipe's system message as a list; empty where there is none, or another is `before`."""
    text = system_text(template)
    if text is None or any(message["role"] in ("system", "developer") for message in before):
        return []
    return [{"role": "system", "content": text}]


def _check_prefill(prefill: str, prompt: str, source: str) -> None:
    if prefill.strip() and prompt.rstrip().endswith(prefill.strip()):
        raise ConfigError(
            f"data.template.prefill: {prefill!r} is how the chat template of {source} ends "
            "already; remove data.template.prefill"
        )


def _check_characters(prompt: str, source: str) -> None:
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{source}: the chat template writes half a character ({error.reason}); mend it"
        ) from None
