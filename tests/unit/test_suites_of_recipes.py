"""The papers' recipes ask their papers' suites during a run, from the published formats."""

from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants

from megatron_opd.errors import DataError
from megatron_opd.recipe.keys import EvalConfig, RunConfig
from megatron_opd.recipe.load import load_config, recipe_files
from megatron_opd.suites.asking import prompts_of, suites_in
from megatron_opd.suites.table import SUITES
from megatron_opd.tasks.prompter import WordsReader
from megatron_opd.tasks.tokenizer import Tokenizer, load_tokenizer
from tests.unit.byte_tokenizer import write_byte_tokenizer
from tests.unit.published_suites import write_suite

MAIN = {  # by how the names of a paper's recipes begin: protocol, and samples of its suites
    "tgpo": ("luffy", {"aime24": 8, "aime25": 8, "amc_2223": 8, "math_500": 1,
                       "minerva_legacy": 1, "olympiad": 1, "arc_c": 1}),
    "tropd": ("tropd", {"aime24": 8, "aime25": 8, "amc23": 8}),
    "rlad": ("official", {"aime24": 8, "aime25": 8, "amc23": 8, "math_500": 1}),
}  # fmt: skip
RECIPES = [name for name in recipe_files() if name.startswith(tuple(MAIN))]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(str(write_byte_tokenizer(tmp_path_factory.mktemp("model"))))


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    for name in SUITES:
        write_suite(name, folder / name)
    return folder


def evaluation_of(config: RunConfig) -> EvalConfig:
    assert config.eval is not None
    return config.eval


def with_data(config: RunConfig, published: Path) -> RunConfig:
    """The recipe with stand-ins for its suites' data."""
    evaluation = evaluation_of(config)
    suites = {
        name: replace(settings, data=str(published / name))
        for name, settings in evaluation.suites.items()
        if settings
    }
    return replace(config, eval=replace(evaluation, suites=suites))


@pytest.mark.parametrize("name", RECIPES)
def test_a_papers_recipes_ask_its_suites(name: str, published: Path, tokenizer: Tokenizer) -> None:
    config = with_data(load_config(name), published)
    protocol, samples = MAIN[name.split("_")[0]]
    opened = [suite for suite, _ in suites_in(config, lambda line: None)]
    assert {suite.name: suite.protocol.samples for suite in opened} == samples
    assert {suite.protocol.name for suite in opened} == {protocol}
    read = WordsReader(config.data.template, tokenizer)
    for suite in opened:
        prompts = prompts_of(suite, read, context=config.max_sequence_length, seed=config.seed)
        assert len(prompts) == len(suite.questions) * suite.protocol.samples > 0


@pytest.mark.parametrize("name", [name for name in RECIPES if "/" not in name])
def test_what_is_asked_is_a_small_part_of_what_a_run_samples(name: str) -> None:
    """At most 7 % of its completions, by the questions that the published data have."""
    config = load_config(name)
    asked = 0
    for suite, settings in evaluation_of(config).suites.items():
        questions = SUITES[suite].questions
        assert questions and settings
        every = settings.every or config.num_steps
        assert config.num_steps % every == 0
        asked += questions * (settings.samples or 1) * (config.num_steps // every + 1)
    rollout = config.rollout
    assert asked < 0.07 * config.num_steps * rollout.num_prompts * rollout.samples_per_prompt


def test_without_the_data_a_line_says_what_to_set(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))

    def opened(*overrides: str) -> list[str]:
        config = load_config("tropd_r1_distill_qwen_1_5b", overrides)
        return [suite.name for suite, _ in suites_in(config, lambda line: None)]

    local = [f"eval.suites.{name}.data={published / name}" for name in ("aime25", "amc23")]
    with pytest.raises(DataError) as error:
        opened(*local)
    assert (
        "give its file or folder as eval.suites.aime24.data=PATH (or eval.suites.aime24=null to "
        "leave it out, eval=null all of them)" in str(error.value)
    )
    assert "\n" not in str(error.value)
    assert opened(*local, f"eval.suites.aime24.data={published / 'aime24'}") == [
        "aime24", "aime25", "amc23"
    ]  # fmt: skip
    assert opened(*local, "eval.suites.aime24=null") == ["aime25", "amc23"]
    with pytest.raises(DataError, match=r"eval.suites.aime24.data=PATH in the place of tropd_math"):
        opened("eval.suites={tropd_math: {every: 5}}")
