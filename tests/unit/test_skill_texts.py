"""`megatron-opd skills check`, and the check of a recipe's bank."""

from pathlib import Path
from typing import Any

import pytest

from megatron_opd.checks.skill_texts import check_skill_texts
from megatron_opd.cli import main as cli
from megatron_opd.errors import ConfigError
from megatron_opd.recipe.load import load_config
from tests.unit.skill_banks import write_directory, write_json, write_words
from tests.unit.tiny_model_files import write_recipe


def recipe(folder: Path, bank: Path, **changes: Any) -> str:
    keys: dict[str, Any] = {
        "method": "sdar",
        "teacher": None,
        "self_teacher": {},
        "data": {"template": {"kind": "raw"}},
        "environment": {"kind": "workshop", "options": {"size": 4}},
        "skills": {"bank": str(bank), "max_tokens": 16, "place": "user"},
    }
    return str(write_recipe(folder, **(keys | changes)))


def test_a_bank_by_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for bank in (write_directory(tmp_path / "bank"), write_json(tmp_path / "bank.json")):
        assert cli.main(["skills", "check", str(bank)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith(f"{bank}: ") and "in 3 categories" in lines[0]
        (heat,) = [line.split() for line in lines if line.startswith("heat")]
        assert heat[1] == "2"
    assert cli.main(["skills", "check", str(bank), "seed=3"]) == 2
    assert cli.main(["skills", "check", str(tmp_path / "absent.json")]) == 2
    assert "there is no" in capsys.readouterr().err


def test_a_recipes_tasks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The workshop's own process says its tasks; three of its sixteen words have a text."""
    bank = write_words(tmp_path / "bank", mug="1+1=2", chill="3", apple="123456789")
    path = recipe(tmp_path, bank)
    assert cli.main(["skills", "check", path]) == 0
    out = capsys.readouterr().out
    assert "mug+chill" in out and "'chill mug' matches several and gets mug+chill" in out
    assert "match nothing and get the general skills alone" in out
    assert out.splitlines()[-1] == "all fit skills.max_tokens=16"
    assert cli.main(["skills", "check", path, "skills.max_tokens=10"]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("skills.max_tokens: 10 is less than the tokens of chill+apple (12); ")


def test_a_recipe_whose_bank_does_not_fit_is_one_line(tmp_path: Path) -> None:
    bank = write_words(tmp_path / "bank", mug="1+1=2", chill="3")
    config = load_config(recipe(tmp_path, bank))
    check_skill_texts(config)
    for overrides, problem in (
        (["skills.max_tokens=4"], r"skills\.max_tokens: 4 is less than the tokens of mug \(5\); "),
        (["skills.retrieval=full", "skills.max_tokens=7"], r"skills\.max_tokens: 7 .* full \(8\)"),
        (["skills.bank=nowhere"], r"skills\.bank: there is no nowhere"),
    ):
        with pytest.raises(ConfigError, match=f"^{problem}"):
            check_skill_texts(load_config(recipe(tmp_path, bank), overrides))
    # One text at a time is what the others choose.
    check_skill_texts(load_config(recipe(tmp_path, bank), ["skills.retrieval=ucb"]))
