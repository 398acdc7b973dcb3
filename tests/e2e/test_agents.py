"""Agents through the command line: real environments' processes, vLLM, and the student as its own
teacher. A killed run that is resumed leaves exactly what an undisturbed one left."""

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest

from megatron_opd.contracts.rows import Source
from tests.e2e.test_train import ROOT, assert_same_run, command, forked, rows_of
from tools import make_demo_agents

# self_teacher -> the phases in which a run with it is killed
KILLED_IN = {
    "{weights: every, every: 2}": (
        "second_turn",
        "turn",
        "environment",
        "self_teacher",
        "forward",
        "optimizer",
    ),
    "{weights: average, decay: 0.5}": ("optimizer",),
}


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("agents") / "assets"
    make_demo_agents.write_assets(folder, seed=0, rules=0, examples=10)
    return folder


def recipe(assets: Path, run_dir: Path, *overrides: str) -> list[str]:
    return [
        str(ROOT / "recipes" / "demo_agents.yaml"),
        f"run_dir={run_dir}",
        f"student.path={assets / 'student'}",
        f"skills.bank={assets / 'skills'}",
        "num_steps=3",
        "train.micro_batch_tokens=150",
        "rollout.num_prompts=4",
        "rollout.samples_per_prompt=2",
        "checkpoint.every=1",
        "eval={every: 2, num_prompts: 3, skills: both}",
        "log.tensorboard=false",
        *overrides,
    ]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("self_teacher", KILLED_IN)
def test_an_agents_run_killed_anywhere_goes_on_as_if_nothing_had_happened(
    assets: Path, tmp_path: Path, self_teacher: str
) -> None:
    """In the middle of an episode too; the bandit's counts and the teacher's copy of the weights
    come back. `environment.cohorts` is 2, so that the engine and environments work by turns."""
    phases = KILLED_IN[self_teacher]
    exact = ["skills.retrieval=ucb", f"self_teacher={self_teacher}"]
    run = recipe(assets, tmp_path, *exact, "environment.cohorts=2", "environment.workers=2")
    _, stderr = forked("tests.e2e.killed_runs", None, tmp_path, ",".join(phases), *run, timeout=500)
    ended = {phase: (tmp_path / f"{phase}.ended").read_text() for phase in phases}
    assert ended == dict.fromkeys(phases, "9 0"), stderr[-3000:]
    for phase in phases:
        assert_same_run(tmp_path / phase, tmp_path / "whole")
    rows = rows_of(tmp_path / "whole")
    assert all(row["rollout/turns/mean"] > 1 for row in rows[:3])
    assert {"eval/with_skills/accuracy", "eval/skills_difference/low"} <= rows[-1].keys()


def test_growing_episodes_train_and_their_rows_say_who_wrote_what(
    assets: Path, tmp_path: Path
) -> None:
    run = tmp_path / "growing"
    growing = ["environment.history={kind: growing}", "max_sequence_length=48"]
    command("train", *recipe(assets, run, *growing, "num_steps=1", "eval=null"))
    lines = [
        json.loads(line)
        for line in (run / "rollouts" / "step-000000.jsonl").read_text().splitlines()
    ]
    assert len(lines) == 8
    several = [line for line in lines if len(line["exchanges"]) > 1]
    assert several
    for line in several:
        heard = [source == Source.ENVIRONMENT for source in line["sources"]]
        turns = 1 + sum(a and not b for a, b in pairwise(heard))
        assert turns == len(line["exchanges"]) == line["turns"]
    assert "Episodes" in (run / "report.html").read_text()


def test_replicas_play_the_same_tasks_as_one_process(assets: Path, tmp_path: Path) -> None:
    """Two data-parallel ranks sample what one does, and make its update."""
    alone, both = tmp_path / "alone", tmp_path / "both"
    command("train", *recipe(assets, alone, "num_steps=2", "eval=null"))
    command("train", *recipe(assets, both, "num_steps=2", "eval=null"), nproc=2)
    for one, two in zip(rows_of(alone), rows_of(both), strict=True):
        if "reward/mean" in one:
            assert one["reward/mean"] == two["reward/mean"]
            assert one["rollout/turns/mean"] == two["rollout/turns/mean"]
            assert one["train/loss"] == pytest.approx(two["train/loss"], rel=1e-4, abs=1e-6)


def test_a_model_directory_is_evaluated_in_the_environment(assets: Path, tmp_path: Path) -> None:
    keys = recipe(assets, tmp_path / "unused", "eval={num_prompts: 3, skills: both}")
    stdout, _ = command("eval", *keys, "--model", assets / "student")
    assert re.search(r"^eval/with_skills/accuracy \d", stdout, re.MULTILINE)
    assert "prompts of workshop, heldout" in stdout


def test_traces_are_of_data(assets: Path, tmp_path: Path) -> None:
    keys = recipe(assets, tmp_path / "run")
    _, stderr = command("traces", *keys, "--out", tmp_path / "out.parquet", code=2)
    assert "environment: traces answer the prompts of data" in stderr


def test_an_environment_that_cannot_start_is_one_line(assets: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import no_such_package\n")
    keys = recipe(assets, tmp_path / "run", "environment.kind=broken:World")
    _, stderr = command("train", *keys, code=2)
    assert "environment.kind: broken cannot be imported" in stderr and "Traceback" not in stderr
