"""Banks of skills, what is retrieved from them, and where it stands."""

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_opd.contracts.rows import Verdict
from megatron_opd.contracts.skills import Skill
from megatron_opd.errors import ConfigError
from megatron_opd.recipe.agents import SkillsConfig
from megatron_opd.skills.bandit import Bandit
from megatron_opd.skills.bank import load_bank
from megatron_opd.skills.open import open_retriever
from megatron_opd.skills.pulls import pulls_of
from tests.rows import row, task
from tests.unit.skill_banks import GENERAL, HEAT, skill, write_directory, write_json


# -------------------------------------------------------------------------------------------- banks
def test_a_directory_with_a_mapping(tmp_path: Path) -> None:
    bank = load_bank(write_directory(tmp_path / "bank"))
    assert (bank.general, bank.general_count) == (GENERAL, 1)
    counts = {category.name: category.count for category in bank.categories}
    assert counts == {"pick_and_place": 1, "heat": 2, "look_at_obj_in_light": 1}
    assert bank.categories[0].task_types == ("pick_and_place", "pick_two_obj_and_place")
    assert bank.categories[0].keywords == ("put", "hat")
    assert bank.text_of(bank.categories[1:2]) == f"{GENERAL}\n\n{HEAT}"


@pytest.mark.parametrize("key", ["task_specific_skills", "query_type_skills"])
def test_a_json_bank_with_either_spelling(tmp_path: Path, key: str) -> None:
    bank = load_bank(write_json(tmp_path / "bank.json", key))
    assert bank.general == (
        "### GENERAL SKILLS ###\n\n1. Look: Do Look. When to apply: Always.\n\n2. Wait: Do Wait. "
        "When to apply: Always.\n\n### COMMON MISTAKES ###\n\n1. Twice the same. Change it."
    )
    assert [(c.name, c.count) for c in bank.categories] == [
        ("pick_and_place", 1),
        ("heat", 2),
        ("clean", 1),
    ]
    assert bank.categories[2].text == (
        "### TASK: clean ###\n\n1. Rinse: Do Rinse. When to apply: Always."
    )


def test_what_is_no_bank_is_one_line(tmp_path: Path) -> None:
    def refused(path: Path) -> str:
        with pytest.raises(ConfigError) as caught:
            load_bank(path)
        return str(caught.value)

    named = "skills.bank: "
    assert "there is no" in refused(tmp_path / "absent.json")
    (tmp_path / "empty").mkdir()
    assert "skill_mapping.json" in refused(tmp_path / "empty")
    wrong = {
        "absent file": {"skill_files": {"heat": "nowhere.md"}, "task_to_skill": {}},
        "absent skill": {"task_to_skill": {"heat": "heet"}},
        "absent word": {"task_keywords": {"heet": ["x"]}},
        "no texts": {"skill_files": ["heat.md"]},
        "no words": {"task_keywords": {"heat": "warm"}},
    }
    for name, changes in wrong.items():
        line = refused(write_directory(tmp_path / name, **changes))
        assert line.startswith(named) and "skill_mapping.json: " in line, line
    blank = write_directory(tmp_path / "blank")
    (blank / "heat.md").write_text(" \n")
    assert "skill_files.heat" in refused(blank)
    (blank / "heat.md").write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in refused(blank)
    file = tmp_path / "bank.json"
    for changes, key in (
        ({"general_skills": [{"title": "x"}]}, "general_skills[0].principle"),
        ({"task_specific_skills": {"heat": [skill("x") | {"title": 3}]}}, "heat[0].title"),
        ({"task_specific_skills": []}, "task_specific_skills"),
        ({"common_mistakes": [{}]}, "common_mistakes[0].description"),
        ({"general_skills": [], "task_specific_skills": {}, "common_mistakes": []}, "no skills"),
    ):
        assert key in refused(write_json(file, **changes)), key
    file.write_text("{}")
    assert "it is no bank" in refused(file)
    file.write_text("[")
    assert "not valid JSON" in refused(file)


# ---------------------------------------------------------------------------------------- retrieval
def retriever(bank: Path, **settings: object):
    return open_retriever(SkillsConfig(str(bank), **settings), 7)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("task_type", "words", "by_words", "by_substring"),
    [
        ("pick_and_place_simple", "put a mug in the fridge", "pick_and_place", "pick_and_place"),
        ("pick_two_obj_and_place", "", "pick_and_place", "pick_and_place"),
        ("pick_heat_then_place_in_recep", "put a hot apple", "heat", "heat"),
        ("", "Put the heated egg", "pick_and_place", "pick_and_place+heat"),
        ("", "find that and wait", "general", "pick_and_place"),  # "that" has "hat"
        ("", "two hats, two lights", "pick_and_place+look_at_obj_in_light",
         "pick_and_place+look_at_obj_in_light"),
        ("unheard_of", "", "general", "general"),
    ],
)  # fmt: skip
def test_matching(
    tmp_path: Path, task_type: str, words: str, by_words: str, by_substring: str
) -> None:
    bank = write_directory(tmp_path / "bank")
    got = retriever(bank).retrieve(task_type, words, (0, 0))
    assert got.name == by_words
    assert got.text.startswith(GENERAL)
    substring = retriever(bank, retrieval="substring").retrieve(task_type, words, (0, 0))
    assert substring.name == by_substring


def test_a_json_banks_categories_are_kinds_of_tasks(tmp_path: Path) -> None:
    chosen = retriever(write_json(tmp_path / "bank.json"))
    for kind, name in {
        "pick_clean_then_place_in_recep": "clean",
        "pick_two_obj_and_place": "pick_and_place",
        "look_at_obj_in_light": "general",
        "heat": "heat",
    }.items():
        assert chosen.retrieve(kind, "", (0, 0)).name == name


def test_full_has_everything(tmp_path: Path) -> None:
    full = retriever(write_directory(tmp_path / "bank"), retrieval="full").retrieve("", "", (3, 4))
    for text in (GENERAL, HEAT, "1. Put it.", "1. Use the desklamp."):
        assert text in full.text


def test_random_is_another_categorys_and_one_per_group(tmp_path: Path) -> None:
    bank = write_directory(tmp_path / "bank")
    first, second = (retriever(bank, retrieval="random") for _ in range(2))
    draws: Counter[str] = Counter()
    for step in range(50):
        got = first.retrieve("pick_heat_then_place_in_recep", "", (step, 3))
        assert got == second.retrieve("pick_heat_then_place_in_recep", "", (step, 3))
        draws[got.name] += 1
    assert set(draws) == {"pick_and_place", "look_at_obj_in_light"}
    assert min(draws.values()) > 10


# ------------------------------------------------------------------------------------------- bandit
def test_the_bandit_is_ucb1_by_hand() -> None:
    bandit = Bandit(["a", "b", "c"], exploration=0.5)
    assert {bandit.choose("heat", turn) for turn in range(3)} == {"a", "b", "c"}
    pulls = [("heat", "a", 0.25), ("heat", "b", 1.0), ("heat", "b", 0.5), ("cool", "a", 1.0)]
    bandit.learn(pulls)
    assert {bandit.choose("heat", turn) for turn in range(9)} == {"c"}  # never tried
    bandit.learn([("heat", "c", 0.5)])
    bound = {
        "a": 0.25 + 0.5 * math.sqrt(math.log(4)),
        "b": 0.75 + 0.5 * math.sqrt(math.log(4) / 2),
        "c": 0.5 + 0.5 * math.sqrt(math.log(4)),
    }
    assert bandit.choose("heat", 5) == max(bound, key=bound.__getitem__) == "b"
    # Untried enough, the worse one is tried again: exploration is what brings it back.
    bandit.learn([("heat", "b", 0.75)] * 40)
    assert bandit.choose("heat", 0) == "c"


def test_equal_arms_are_decided_by_the_group() -> None:
    bandit = Bandit(["a", "b"], exploration=1.0)
    bandit.learn([("heat", "a", 1.0), ("heat", "b", 1.0)])
    assert [bandit.choose("heat", turn) for turn in range(4)] == ["a", "b", "a", "b"]


def test_ucb_learns_and_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    """Only the heat text helps: it is soon what almost every task reads, before and after a
    resume, and a resumed run chooses as the other one does."""
    bank = write_directory(tmp_path / "bank")
    ucb = retriever(bank, retrieval="ucb", exploration=0.3)
    resumed = None
    chosen: list[str] = []
    for step in range(30):
        names = [ucb.retrieve("heat", "", (step, number)).name for number in (1, 2)]
        chosen += names
        if resumed:
            assert names == [resumed.retrieve("heat", "", (step, n)).name for n in (1, 2)]
        pulls = [("heat", name, float(name == "heat")) for name in names]
        for learning in filter(None, (ucb, resumed)):
            learning.learn(pulls)
        if step == 9:
            resumed = retriever(bank, retrieval="ucb", exploration=0.3)
            resumed.load_state_dict(json.loads(json.dumps(ucb.state_dict())))
    assert Counter(chosen[-30:])["heat"] > 25


def test_pulls_are_one_per_group_with_its_mean_score() -> None:
    def scored(group: int, sample: int, score: float, kind: str, name: str):
        made = row([1], group=group, sample=sample, of=task(index=group))
        verdict = Verdict(score, score == 1, "won")
        episode = replace(made.episode, verdict=verdict, task_type=kind, skill=name)
        return replace(made, episode=episode)

    rows = [scored(1, 0, 1.0, "cool", "b"), scored(0, 0, 1.0, "heat", "a")]
    rows += [scored(0, 1, 0.0, "heat", "a")] * 2  # two turns of one episode
    assert pulls_of(rows) == [("heat", "a", 0.5), ("cool", "b", 1.0)]


def test_choosing_needs_a_choice(tmp_path: Path) -> None:
    bank = write_json(tmp_path / "bank.json", task_specific_skills={"heat": [skill("Heat")]})
    for retrieval in ("random", "ucb"):
        with pytest.raises(ConfigError, match=r"skills\.retrieval: .* has 1"):
            retriever(bank, retrieval=retrieval)


# ---------------------------------------------------------------------------------------- its place
SYSTEM = {"role": "system", "content": "You are an agent."}
USER = {"role": "user", "content": "Go."}
OTHERS = [{"role": "assistant", "content": "Where?"}]


def test_where_a_skill_stands() -> None:
    chosen = Skill("heat", "1. Heat it.")
    assert chosen.within([USER], "system") == [{"role": "system", "content": "1. Heat it."}, USER]
    assert chosen.within([SYSTEM, USER], "system") == [
        {"role": "system", "content": "You are an agent.\n\n1. Heat it."},
        USER,
    ]
    ahead = {"role": "user", "content": "1. Heat it.\n\nGo."}
    assert chosen.within([SYSTEM, USER, *OTHERS, USER], "user") == [SYSTEM, USER, *OTHERS, ahead]
    assert chosen.within([SYSTEM, USER], "raw_prefix") == [SYSTEM, USER]
    assert chosen.ahead("system") == chosen.ahead("user") == ""
    assert chosen.ahead("raw_prefix") == "[Privileged Skill Information]\n1. Heat it.\n\n"
