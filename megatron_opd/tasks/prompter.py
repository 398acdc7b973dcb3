"""Words as tokens: those of an environment, with a skill in its place, and those of a suite."""

from dataclasses import replace

import numpy as np

from megatron_opd.contracts.skills import Place, Skill
from megatron_opd.contracts.suites import SuiteProtocol
from megatron_opd.errors import ConfigError, DataError
from megatron_opd.recipe.data import TemplateConfig
from megatron_opd.tasks.messages import Message
from megatron_opd.tasks.template import render, render_messages, system_message
from megatron_opd.tasks.tokenizer import Tokenizer, ends_of

# Stands for an answer of the model, to see what a template writes behind it. No template has it.
_ANSWER = "\u2042answer\u2042"
_THOUGHT = "<think>\nthought\n</think>\n\n"


class TemplatePrompter:
    """Renders and tokenises the words of environments.

    `place` says where a skill goes: `SkillsConfig.place`. `bare` makes continuations bare text.
    """

    def __init__(
        self, template: TemplateConfig, tokenizer: Tokenizer, place: Place, *, bare: bool = False
    ) -> None:
        self._template = template
        self._tokenizer = tokenizer
        self._place = place
        self._bare = bare

    def prompt(self, words: str, skill: Skill | None = None) -> np.ndarray:
        """See `Prompter.prompt`; int32."""
        text = self._template.text.replace("{problem}", words)
        messages = [*self._system(), _message("user", text)]
        if skill:
            messages = skill.within(messages, self._place)
        if self._template.kind == "raw":
            text = "".join(str(message["content"]) for message in messages)
            text += self._template.prefill
        else:
            text = render_messages(self._template, self._tokenizer, messages)
        if skill:
            text = skill.ahead(self._place) + text
        return self._encode(text, add_special_tokens=self._template.kind == "raw")

    def continuation(self, words: str, *, ended: bool) -> np.ndarray:
        """See `Prompter.continuation`; int32."""
        if self._bare or self._template.kind == "raw":
            return self._encode(words)
        messages = [*self._opening(), _message("assistant", _ANSWER), _message("user", words)]
        text = render_messages(self._template, self._tokenizer, messages)
        behind_ids = self._encode(text.rpartition(_ANSWER)[2])
        has_end = len(behind_ids) > 0 and int(behind_ids[0]) in ends_of(self._tokenizer).ids
        return behind_ids[1:] if ended and has_end else behind_ids

    def check_growing(self) -> None:
        """Raises ConfigError for a chat template that rewrites earlier answers, so that a
        conversation cannot grow at its end."""
        if self._bare or self._template.kind == "raw":
            return
        answer = _message("assistant", _THOUGHT + _ANSWER)
        messages = [*self._opening(), answer, _message("user", "observation")]
        text = render_messages(self._template, self._tokenizer, messages)
        if _THOUGHT + _ANSWER not in text:
            raise ConfigError(
                "environment.history.kind: the chat template of "
                f"{self._tokenizer.name_or_path} changes or drops earlier answers' thoughts, so a "
                "conversation cannot grow; choose window, or a template that keeps them"
            )

    def _opening(self) -> list[Message]:
        return [*self._system(), _message("user", "observation")]

    def _system(self) -> list[Message]:
        return system_message(self._template) if self._template.kind == "chat" else []

    def _encode(self, text: str, *, add_special_tokens: bool = False) -> np.ndarray:
        return _encoded(
            self._tokenizer, text, "an environment", add_special_tokens=add_special_tokens
        )


class WordsReader:
    """Renders and tokenises the words of suites: with the recipe's template, and what a protocol
    has in the place of its system message and its prefill."""

    def __init__(self, template: TemplateConfig, tokenizer: Tokenizer) -> None:
        self._template = template
        self._tokenizer = tokenizer

    def __call__(self, words: str, protocol: SuiteProtocol) -> tuple[str, np.ndarray]:
        """See `suites.asking.Reader`. A raw template is taken as it is."""
        template = self._template
        is_chat = template.kind == "chat"
        if is_chat and protocol.system is not None:
            template = replace(template, system=protocol.system)
        prefill = protocol.prefill if is_chat else None
        if prefill is not None:
            template = replace(template, prefill="")
        text = render(template, self._tokenizer, words)
        # some chat templates open the response with the same words
        if prefill and not text.rstrip().endswith(prefill.strip()):
            text += prefill
        # A chat template writes the special tokens itself.
        return text, _encoded(self._tokenizer, text, "a suite", add_special_tokens=not is_chat)


def _encoded(
    tokenizer: Tokenizer, text: str, source: str, *, add_special_tokens: bool
) -> np.ndarray:
    """The tokens, int32, of what `source` says. Raises DataError."""
    settings = {"return_attention_mask": False, "verbose": False}
    try:
        encoding = tokenizer([text], add_special_tokens=add_special_tokens, **settings)
    except Exception as error:  # a character that the vocabulary lacks
        raise DataError(
            f"the tokenizer of {tokenizer.name_or_path} cannot read what {source} says ({error}): "
            f"{text[:80]!r}"
        ) from error
    return np.asarray(encoding["input_ids"][0], dtype=np.int32)


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}
