"""The doctor on a real layout: it passes what is right, and fails what was broken on purpose."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_opd.doctor.judge import judge
from megatron_opd.doctor.shrink import OTHER, shrink
from megatron_opd.recipe.load import dump_config, load_config
from tests.unit.tiny_model_files import write_recipe


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    return str(write_recipe(tmp_path, method="opd"))


@pytest.mark.slow
def test_a_sound_recipe_passes_on_its_layout(recipe: str) -> None:
    """Two processes, a vLLM engine in each."""
    doctor = subprocess.run(
        [
            sys.executable,
            "-m",
            "megatron_opd",
            "doctor",
            recipe,
            "student.layout.tensor_model_parallel_size=2",
        ],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    lines = doctor.stdout.splitlines()
    assert doctor.returncode == 0, doctor.stdout + doctor.stderr[-3000:]
    found = {line[6:24].strip(): line[26:] for line in lines}
    assert list(found)[-5:] == [
        "recipe tiny",
        "gradients",
        "teacher = student",
        "other teacher",
        "refit",
    ]
    assert "2 updates of opd on 2 processes (student TP2, teacher TP1)" in found["gradients"]
    assert "of one process" in found["gradients"] and "distil: loss" in found["teacher = student"]
    assert "nats a token" in found["refit"]


def test_what_is_broken_on_purpose_fails(recipe: str, tmp_path: Path, run_distributed) -> None:
    small = shrink(load_config(recipe), tmp_path / "small", 1)
    (tmp_path / "small.yaml").write_text(dump_config(small))
    shutil.copytree(tmp_path / "small" / "teacher", tmp_path / "unchanged")
    run_distributed(__file__, 1, tmp_path)
    sound, doubled, other, unchanged = json.loads((tmp_path / "found.json").read_text())

    def failing(**found: list) -> list[str]:
        on_layout = {"updates": sound, "other_teacher": other} | found
        ours = judge(
            small, 1, on_layout | {"refit": {"mean": 0, "max": 0, "stale": 1, "tokens": 1}}, sound
        )
        return [finding.subject for finding in ours if finding.status == "fail"]

    assert failing() == []
    assert failing(updates=doubled) == ["gradients"]
    assert failing(other_teacher=unchanged) == ["other teacher"]
    assert failing(own_teacher=other, distance=sound) == ["teacher = student"]


# -------------------------------------------------------------------------------------- the program
def main(folder: Path) -> int:
    from dataclasses import replace

    from megatron_opd.architectures.architecture import architecture_of
    from megatron_opd.doctor.measure import updates
    from megatron_opd.doctor.rows import recorded
    from megatron_opd.runs.assemble import assemble
    from megatron_opd.world import processes

    config = load_config(str(folder / "small.yaml"))
    assert config.teacher is not None
    rows = recorded(config, architecture_of(config.student).vocab_size)
    processes.start()
    sound = updates(assemble(config), rows, steps=2)
    learner = assemble(config)
    objective = learner.trainer.objective

    def twice(*arguments):
        loss, sums = objective(*arguments)
        return 2 * loss, sums

    learner.trainer.objective = twice  # a gradient of the wrong scale under the right loss
    doubled = updates(learner, rows, steps=2)
    others = [
        updates(
            assemble(replace(config, teacher=replace(config.teacher, path=path))), rows, steps=1
        )
        for path in (config.teacher.path + OTHER, str(folder / "unchanged"))
    ]
    (folder / "found.json").write_text(json.dumps([sound, doubled, *others]))
    processes.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
