"""The words of environments as tokens: templates, skills in three places, growing conversations."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_opd.contracts.skills import Skill
from megatron_opd.errors import ConfigError, DataError
from megatron_opd.recipe.data import TemplateConfig
from megatron_opd.tasks.prompter import TemplatePrompter
from megatron_opd.tasks.tokenizer import load_tokenizer
from tests.unit.byte_tokenizer import write_byte_tokenizer

CHAT = TemplateConfig(system="S")
RAW = TemplateConfig("raw", text="Q {problem}", prefill="A")
SKILL = Skill("how", "try")
DROPS_THOUGHTS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    return load_tokenizer(write_byte_tokenizer(tmp_path))


@pytest.mark.parametrize(
    ("template", "place", "expected"),
    [
        (CHAT, "system", "<system>S\n\ntry</s><user>go</s><assistant>"),
        (CHAT, "user", "<system>S</s><user>try\n\ngo</s><assistant>"),
        (
            CHAT,
            "raw_prefix",
            "[Privileged Skill Information]\ntry\n\n<system>S</s><user>go</s><assistant>",
        ),
        (TemplateConfig(), "system", "<system>try</s><user>go</s><assistant>"),
        (RAW, "user", "try\n\nQ goA"),
        (RAW, "raw_prefix", "[Privileged Skill Information]\ntry\n\nQ goA"),
    ],
)
def test_a_skill_stands_where_the_recipe_says(
    tokenizer: Any, template: TemplateConfig, place: Any, expected: str
) -> None:
    prompter = TemplatePrompter(template, tokenizer, place)
    assert tokenizer.decode(prompter.prompt("go", SKILL)) == expected
    without = tokenizer.decode(prompter.prompt("go"))
    assert "try" not in without and without.endswith(("<user>go</s><assistant>", "Q goA"))


def test_a_conversation_grows_by_what_the_template_writes_between_answers(tokenizer: Any) -> None:
    prompter = TemplatePrompter(CHAT, tokenizer, "system")
    prompter.check_growing()
    ended = prompter.continuation("seen", ended=True)
    assert tokenizer.decode(ended) == "<user>seen</s><assistant>"
    cut = prompter.continuation("seen", ended=False)
    assert tokenizer.decode(cut) == "</s><user>seen</s><assistant>"  # the end that was not sampled
    # appended to a sampled answer it is the whole conversation, rendered at once
    whole = [*prompter.prompt("go"), *tokenizer("yes")["input_ids"], 0, *ended]
    assert tokenizer.decode(whole) == (
        "<system>S</s><user>go</s><assistant>yes</s><user>seen</s><assistant>"
    )


def test_bare_observations_join_the_models_own_words(tokenizer: Any) -> None:
    for prompter in (
        TemplatePrompter(CHAT, tokenizer, "system", bare=True),
        TemplatePrompter(RAW, tokenizer, "user"),
    ):
        prompter.check_growing()
        for ended in (True, False):
            assert tokenizer.decode(prompter.continuation("<i>x</i>", ended=ended)) == "<i>x</i>"


def test_a_template_that_drops_thoughts_does_not_grow(tokenizer: Any) -> None:
    tokenizer.chat_template = DROPS_THOUGHTS
    with pytest.raises(ConfigError, match=r"environment\.history\.kind: .* drops .* choose window"):
        TemplatePrompter(CHAT, tokenizer, "system").check_growing()
    TemplatePrompter(CHAT, tokenizer, "system", bare=True).check_growing()


def test_words_that_the_tokenizer_lacks_are_named(tokenizer: Any) -> None:
    class Narrow:
        name_or_path = "narrow"

        def __call__(self, texts: list[str], **settings: Any) -> Any:
            raise ValueError("WordLevel error: Missing [UNK] token")

    prompter = TemplatePrompter(replace(RAW, prefill=""), Narrow(), "user")
    with pytest.raises(DataError, match=r"tokenizer of narrow cannot read .* says .*: 'Q tree'"):
        prompter.prompt("tree")
