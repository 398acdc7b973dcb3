"""The real ALFWorld: its hand-coded expert plays games of our generator through the pool."""

import json
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

from megatron_opd.contracts.environments import Exchange, Observation
from megatron_opd.environments.alfworld import TASK_TYPES
from megatron_opd.environments.open import open_dialogue, open_environments, task_ids
from megatron_opd.environments.pool import EnvironmentPool
from megatron_opd.recipe.agents import EnvironmentConfig

ROOT = Path(__file__).resolve().parents[2]
SEED = 3  # the expert wins its first six games; without --unplayed the generator keeps such alone


@pytest.fixture(scope="module")
def games(agents_python: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six games of training, one of each kind, and one of other rooms."""
    folder = tmp_path_factory.mktemp("alfworld") / "data"
    tool = [agents_python, "tools/make_alfworld_games.py", "--out", folder, "--unplayed"]
    counts = ["--train", "6", "--seen", "0", "--unseen", "1", "--seed", str(SEED)]
    subprocess.run([*tool, *counts], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_expert_plays_every_kind_of_task(games: Path, agents_python: str) -> None:
    config = EnvironmentConfig(
        "alfworld", options={"data_dir": str(games)}, python=agents_python, workers=2
    )
    with ExitStack() as closing:
        pool = open_environments(config, closing)
        ids = task_ids(config, "train", pool)
        assert ids == sorted(ids) and len(ids) == 6
        assert len(pool.task_ids("valid_unseen")) == 1 and pool.task_ids("valid_seen") == []
        seen = play(pool, ids)
    assert {first.task_type for first, _, _ in seen.values()} == set(TASK_TYPES)
    for name, (first, last, actions) in seen.items():
        assert last.won and last.terminated and last.reward == 1.0, (name, actions, last)
        assert first.task and f"Your task is to: {first.task}" in first.text
        assert first.admissible and "help" not in first.admissible
    dialogue = open_dialogue(config)
    first, last, actions = seen[ids[0]]
    prompt = dialogue.prompt([Exchange(first, actions[0], True)], last)
    assert f"Your task is to: {first.task}" in prompt and actions[0] in prompt


@pytest.mark.slow
def test_games_have_alfworld_s_format(games: Path) -> None:
    for file in games.rglob("game.tw-pddl"):
        game = json.loads(file.read_text())
        assert {"pddl_domain", "grammar", "pddl_problem", "solvable", "walkthrough"} == set(game)
        trajectory = json.loads((file.parent / "traj_data.json").read_text())
        assert file.parent.parent.name.startswith(trajectory["task_type"] + "-")
        assert trajectory["turk_annotations"]["anns"][0]["task_desc"] in game["grammar"]


def play(
    pool: EnvironmentPool, ids: list[str]
) -> dict[str, tuple[Observation, Observation, list[str]]]:
    """First and last observation of every task, and the expert's actions."""
    firsts: dict[int, Observation] = {}
    actions: dict[int, list[str]] = {slot: [] for slot in range(len(ids))}
    played = {}
    for slot, task_id in enumerate(ids):
        pool.reset(slot, task_id, seed=0)
    while len(played) < len(ids):
        arrived = pool.ready(120.0)
        assert arrived, "no answer"
        for slot, observation in arrived:
            first = firsts.setdefault(slot, observation)
            if observation.ended or len(actions[slot]) == 60:
                played[ids[slot]] = first, observation, actions[slot]
                continue
            action = pool.expert_action(slot)
            assert action
            actions[slot].append(action)
            pool.step(slot, action)
    return played
