"""What is said of a recipe with an environment, or without one, before a process starts."""

from pathlib import Path
from typing import Any

import pytest

from megatron_opd.checks.training import check_recipe
from megatron_opd.errors import ConfigError
from megatron_opd.recipe.load import load_config
from tests.unit.skill_banks import write_json
from tests.unit.tiny_model_files import write_recipe

RAW = {"template": {"kind": "raw"}}
WORKSHOP: dict[str, Any] = {"kind": "workshop", "max_turns": 3}


class Unplayable:
    """A class that is no environment: it has no step."""

    def reset(self) -> None:
        pass


def check(folder: Path, *overrides: str, **changes: Any) -> list[str]:
    keys = {"environment": WORKSHOP, "data": RAW, "method": "grpo", "teacher": None} | changes
    if keys.get("skills"):
        keys["skills"] |= {"bank": str(write_json(folder / "bank.json"))}
    return check_recipe(load_config(str(write_recipe(folder, **keys)), overrides), world_size=None)


def test_an_environment_takes_the_place_of_data(tmp_path: Path) -> None:
    assert check(tmp_path) == []
    assert check(tmp_path, "eval={num_prompts: 2}") == []
    skills = {"place": "user", "reader": "student"}
    assert check(tmp_path, "eval={skills: both}", skills=skills) == []


@pytest.mark.parametrize(
    ("problem", "overrides"),
    [
        (r"environment\.kind: unknown kind; did you mean workshop\?", ["environment.kind=workshp"]),
        (r"environment\.kind: no_module cannot be imported",
         ["environment.kind='no_module:World'"]),
        (r"environment\.kind: .*Unplayable has no step",
         ["environment.kind='tests.unit.test_environment_checks:Unplayable'"]),
        (r"environment\.options: budget: 1 must be an integer of 2",
         ["environment.options.budget=1"]),
        (r"environment\.python: /no/python is no program", ["environment.python=/no/python"]),
        (r"environment\.dialogue: must be written module:Class", ["environment.dialogue=mine"]),
        (r"environment\.train: .*empty\.txt has no task ids", ["environment.train=EMPTY"]),
        (r"environment\.history\.length: no effect with kind=growing",
         ["environment.history={kind: growing, length: 3}"]),
        (r"environment\.history\.observations: no effect with kind=window",
         ["environment.history.observations=text"]),
        (r"data\.train: no effect, the tasks are those of environment", ["data.train=x.jsonl"]),
        (r"data\.heldout: no effect", ["data.heldout=x.jsonl"]),
        (r"data\.max_prompt_tokens: no effect", ["data.max_prompt_tokens=5"]),
        (r"reward\.workers: no effect, the environment workshop gives", ["reward.workers=3"]),
        (r"method: luffy reads traces", ["method=luffy"]),
        (r"method: sft reads traces", ["method=sft"]),
        (r"eval\.skills: both needs skills", ["eval={skills: both}"]),
        (r"data\.train: missing; give .* or an environment", ["environment=null"]),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(tmp_path: Path, problem: str, overrides: list[str]) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("\n\n")
    overrides = [text.replace("EMPTY", str(empty)) for text in overrides]
    with pytest.raises(ConfigError, match=f"^{problem}"):
        check(tmp_path, *overrides)


@pytest.mark.parametrize(
    ("problem", "skills", "overrides"),
    [
        (r"skills\.place: a raw template has no system message", {"place": "system"}, []),
        (r"skills\.exploration: no effect with retrieval=keyword",
         {"place": "user", "exploration": 2.0}, []),
        (r"skills: needs an environment", {"place": "user"},
         ["environment=null", "data.train=TRAIN"]),
    ],
)  # fmt: skip
def test_skills_that_do_not_fit_are_one_line(
    tmp_path: Path, problem: str, skills: dict[str, Any], overrides: list[str]
) -> None:
    overrides = [text.replace("TRAIN", str(tmp_path / "train.jsonl")) for text in overrides]
    with pytest.raises(ConfigError, match=f"^{problem}"):
        check(tmp_path, *overrides, skills=skills)
