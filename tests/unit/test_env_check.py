"""`megatron-opd env check`, the workshop, the plain dialogue, and the kinds of environments."""

import json
import random
import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_opd.cli.main import main
from megatron_opd.contracts.environments import Action, Exchange, Observation
from megatron_opd.environments.open import open_dialogue, open_environments, task_ids
from megatron_opd.environments.workshop import HELD_OUT_SHARE, ITEMS, JOBS, Rules, Workshop
from megatron_opd.environments.workshop_dialogue import WORDS, answer
from megatron_opd.environments.workshop_skills import lines_of, partly_wrong, write_bank
from megatron_opd.errors import ConfigError
from megatron_opd.recipe.agents import EnvironmentConfig, HistoryConfig
from megatron_opd.skills.bank import load_bank

WORKSHOP = EnvironmentConfig("workshop")


def test_a_workshop_is_won_by_who_knows_its_rules() -> None:
    world = Workshop(size=4, budget=3, seed=1)
    rules = Rules.drawn(1, 4)
    text, info = world.reset(seed=0, options={"task_id": "heat mug"})
    assert (text, info["task"], info["task_type"]) == ("hall", "heat mug", "heat")
    right = [f"open {rules.place_of['mug']}", f"use {rules.tool_for['heat']}"]
    wrong = f"open {next(p for p in rules.place_of.values() if p != rules.place_of['mug'])}"
    assert world.step(right[1])[:4] == ("nothing hall", 0.0, False, False)  # not yet
    assert world.step(right[0])[:2] == ("gotit bench", 0.0)
    text, reward, won, truncated, info = world.step(wrong)
    assert (text, reward, won, truncated) == ("nothing bench", 0.0, False, True)
    assert info["score"] == 0.5 and info["valid"] is True
    world.reset(seed=0, options={"task_id": "heat mug"})
    assert world.step("dance")[4]["valid"] is False
    actions = [world.expert_action()]
    world.step(actions[0])
    actions.append(world.expert_action())
    assert actions == right
    assert world.step(actions[1])[:4] == ("worked bench", 1.0, True, False)


def test_both_splits_have_every_job_and_every_thing() -> None:
    world = Workshop()
    splits = {split: world.task_ids(split) for split in ("train", "heldout")}
    both = splits["train"] + splits["heldout"]
    assert sorted(both) == sorted(f"{job} {item}" for job in JOBS for item in ITEMS)
    for ids in splits.values():
        assert {name.split()[0] for name in ids} == set(JOBS)
        assert {name.split()[1] for name in ids} == set(ITEMS)
    assert len(splits["heldout"]) * HELD_OUT_SHARE == len(JOBS) * len(ITEMS)
    assert world.task_ids("valid") == []


@pytest.mark.parametrize(("options", "problem"), [({"size": 9}, "size: 9"), ({"budget": 1}, "1")])
def test_options_of_a_workshop(options: dict[str, int], problem: str) -> None:
    assert problem in str(Workshop.check(options))
    with pytest.raises(ValueError, match=problem):
        Workshop(**options)


def test_the_words_of_a_workshop_are_all_known() -> None:
    """Of random play, its prompts, and its skills: a tokenizer with a token per word is enough."""
    draw = random.Random(0)
    dialogue = open_dialogue(WORKSHOP)
    with ExitStack() as closing:
        pool = open_environments(replace(WORKSHOP, options={"budget": 6}), closing)
        for task in task_ids(WORKSHOP, "heldout", pool)[:4]:
            pool.reset(0, task, seed=0)
            ((_, seen),) = pool.ready(20.0)
            past: list[Exchange] = []
            while not seen.ended:
                prompt = dialogue.prompt(past, seen)
                assert set(prompt.split()) <= set(WORDS)
                assert 6 <= len(prompt.split()) <= 40
                assert len(past) < 3 or prompt.count("open") + prompt.count("use ") <= 2
                action = draw.choice(seen.admissible or ())
                assert dialogue.action(answer(action)) == Action(action)
                pool.step(0, action)
                past.append(Exchange(seen, action, True))
                ((_, seen),) = pool.ready(20.0)
                assert set(dialogue.reply(seen).split()) <= set(WORDS)
    assert {word for line in lines_of(Rules.drawn(0)).values() for word in line.split()} <= set(
        WORDS
    )


@pytest.mark.parametrize("text", ["open drawer", "<act> open door </act>", "<act> open </act>", ""])
def test_a_text_without_an_action_of_the_workshop(text: str) -> None:
    read = open_dialogue(WORKSHOP).action(text)
    assert not read.valid and read.text in WORDS


def test_banks_of_a_workshop(tmp_path: Path) -> None:
    rules = Rules.drawn(3)
    write_bank(tmp_path / "bank", rules)
    write_bank(tmp_path / "bank.json", rules)
    by_word, by_job = load_bank(tmp_path / "bank"), load_bank(tmp_path / "bank.json")
    texts = {category.name: category.text for category in by_word.categories}
    assert texts["mug"] == f"mug in {rules.place_of['mug']} ." and len(texts) == 16
    assert by_job.general_count == 8
    assert f"chill with {rules.tool_for['chill']} ." in by_job.categories[0].text


def test_a_share_of_a_bank_is_wrong() -> None:
    rules = Rules.drawn(3)
    spoilt = partly_wrong(rules, 0.25, seed=1)
    for right, wrong in (
        (rules.place_of, spoilt.place_of),
        (rules.tool_for, spoilt.tool_for),
    ):
        changed = [key for key in right if right[key] != wrong[key]]
        assert len(changed) == 2 and set(wrong.values()) <= set(right.values())
    assert partly_wrong(rules, 0.25, seed=1) == spoilt
    assert partly_wrong(rules, 0.0, seed=1) == rules


def test_the_plain_dialogue_shows_the_last_exchanges() -> None:
    config = EnvironmentConfig("own:Thing", history=HistoryConfig(length=1))
    dialogue = open_dialogue(config)
    first = Observation("a door", task="leave", admissible=("push", "pull"))
    prompt = dialogue.prompt([], first)
    assert "leave" in prompt and "a door" in prompt and "push, pull" in prompt
    past = [Exchange(first, "push", True), Exchange(Observation("it is shut"), "kick", True)]
    prompt = dialogue.prompt(past, Observation("it hurts", task="leave"))
    assert (
        "Observation 2: it is shut\nAction 2: kick" in prompt
        and "Observation 3: it hurts" in prompt
    )
    assert "a door" not in prompt and "actions you can take" not in prompt
    assert dialogue.action("<think>so</think><action> pull </action><action>x") == Action("pull")
    assert dialogue.action(" just pull ") == Action("just pull", valid=False)
    assert dialogue.action("<action></action>").valid is False


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ("", "has no task ids"),
        ("a\n\nb\na\n", "'a' is in line 1 and in line 4"),
    ],
)
def test_files_of_task_ids(tmp_path: Path, lines: str, problem: str) -> None:
    file = tmp_path / "ids.txt"
    file.write_text(lines)
    config = replace(WORKSHOP, train=str(file), heldout=3)
    with ExitStack() as closing:
        pool = open_environments(config, closing)
        with pytest.raises(ConfigError, match=rf"^environment.train: .*{problem}"):
            task_ids(config, "train", pool)
        assert task_ids(config, "heldout", pool) == ["0", "1", "2"]
        file.write_text("a\n\n b \n")
        assert task_ids(config, "train", pool) == ["a", "b"]


OWN = '''
class Doors:
    """The second of two doors leads out."""

    def __init__(self, doors=2):
        self.doors = doors

    def reset(self, *, seed, options):
        self.info = {"admissible": [f"Door {n}" for n in range(self.doors)]}
        return "doors", self.info

    def step(self, action):
        out = action == "Door 1"
        return "out" if out else "wall", float(out), out, False, self.info


class Fails(Doors):
    def step(self, action):
        raise ValueError("stuck")


class Lower:
    """Reads what it does not write."""

    def __init__(self, config): ...

    def prompt(self, past, observation):
        return observation.text

    def reply(self, observation):
        return observation.text

    def action(self, text):
        from megatron_opd.contracts.environments import Action

        return Action(text.lower())

    def written(self, action):
        return action

    def end_of_action(self, text):
        return None
'''


def test_env_check_plays_an_environment_of_ones_own(
    own_module: Callable[[str, str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    own_module("own_doors", OWN)
    command = ["env", "check", "own_doors:Doors", "train=5", "options.doors=3", "--seconds=0.2"]
    assert main([*command, "heldout=2"]) == 0
    out = capsys.readouterr().out
    assert "5 in train, 2 in heldout" in out and "random actions of those it lists" in out
    assert "needs environment.reward=return" in out and "MiB a process" in out
    assert "the prompt of turn " in out and "Door 2" in out


def test_env_check_plays_the_workshop_by_its_script(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "check", "workshop", "environment.workers=2", "--seconds=0.1"]) == 0
    out = capsys.readouterr().out
    assert "by its own script" in out and "won 100%" in out and "2 process(es)" in out
    # of two processes, either may end the first one
    assert re.search(r"first episode, task \w+ \w+: won", out)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["workshp"], "workshp: unknown environment or recipe; did you mean workshop?"),
        (["demo"], "demo: has no environment"),
        (["workshop", "options.siz=4"], "environment.options.siz: unknown option; did you mean"),
        (["workshop", "options.size=90"], "environment.options: size: 90 must be"),
        (["workshop", "worker=4"], "environment.worker: unknown key; did you mean workers?"),
        (["workshop", "train=nothing"], "environment.train: workshop has no tasks in 'nothing'"),
        (["workshop", "--seconds=-1"], "--seconds: -1 must be from 0 to 3600"),
        (["own_doors:Fails", "train=1"], "no episode ended: step: ValueError: stuck"),
        (["own_doors:Doors"], "names no tasks: it has no method task_ids"),
        (
            ["own_doors:Doors", "train=1", "dialogue=own_doors:Lower"],
            "Lower cannot express the action 'Door 0', which it reads as 'door 0'",
        ),
        (["alfworld", "options.data_dir=/nowhere"], "data_dir: there is no /nowhere/json_2.1.1"),
    ],
)
def test_env_check_says_what_is_wrong_in_one_line(
    own_module: Callable[[str, str], Path],
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    problem: str,
) -> None:
    own_module("own_doors", OWN)
    extra = [] if any("seconds" in word for word in arguments) else ["--seconds=0.1"]
    assert main(["env", "check", *arguments, *extra]) in (1, 2)
    printed = capsys.readouterr()
    assert problem in printed.err and printed.err.count("\n") == 1, printed.err


def test_alfworld_s_dialogue_reads_as_released() -> None:
    dialogue = open_dialogue(EnvironmentConfig("alfworld", history=HistoryConfig(length=2)))
    read = dialogue.action
    assert read("<think>a</think><action>Go To Desk 1</action>") == Action("go to desk 1")
    assert read("<action>look</action>") == Action("look", valid=False)  # no thought
    assert read("<think>\u770b</think><action>look</action>") == Action("look", valid=False)
    assert read("x" * 40) == Action("x" * 30, valid=False)
    first = Observation("Welcome. Your task is to: go.", task="go", admissible=("look",))
    assert "step(s)" not in dialogue.prompt([], first)
    past = [Exchange(first, f"go {n}", True) for n in range(3)]
    prompt = dialogue.prompt(past, replace(first, text="A desk."))
    assert "[Observation 2: 'Welcome. Your task is to: go.', Action 2: 'go 1']" in prompt
    assert "Action 1" not in prompt and "You have taken 3 step(s)" in prompt
    assert "'look'" in prompt and "step 4 and see: A desk." in prompt


def test_alfworld_s_tasks_are_those_it_plays(tmp_path: Path) -> None:
    """Sorted, whatever order the directory has; as the package leaves games out."""
    from megatron_opd.environments.alfworld import AlfWorld

    split = tmp_path / "json_2.1.1" / "train"

    def game(name: str, task_type: str = "pick_two_obj_and_place", solvable: str = "true") -> None:
        folder = split / name / "trial_1"
        folder.mkdir(parents=True)
        (folder / "game.tw-pddl").write_text(f'{{"x": "\\"solvable\\"", "solvable": {solvable}}}')
        (folder / "traj_data.json").write_text(json.dumps({"task_type": task_type}))

    game("b-Mug")
    game("a-Mug")
    game("c-Mug", solvable="false")
    game("d-MugSliced")
    game("pick_and_place_with_movable_recep-Mug")
    game("e-Mug", task_type="another")
    world = object.__new__(AlfWorld)  # the engine is not needed, and may not be installed
    world._data = tmp_path
    assert world.task_ids("train") == [f"json_2.1.1/train/{n}-Mug/trial_1" for n in "ab"]
    assert world.task_ids("heldout") == []
