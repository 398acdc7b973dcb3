"""`hf/` of a run is of its last checkpoint, and older ones are kept under the names of their
steps."""

import json
from pathlib import Path

import pytest

from megatron_opd.runs.exported import due
from megatron_opd.weights.hf import Origin, companions, read_origin


def save(run: Path, step: int, content: str) -> None:
    directory = run / "checkpoints" / f"step-{step:06d}"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "manifest.json").write_text(content)


def export(run: Path, origin: Origin | None) -> None:
    (run / "hf").mkdir()
    if origin:
        (run / "hf" / "origin.json").write_text(json.dumps(origin))


def test_an_export_of_the_same_checkpoint_stays(tmp_path: Path) -> None:
    save(tmp_path, 4, "a")
    origin = due(tmp_path, 4)
    assert origin and origin["step"] == 4
    export(tmp_path, origin)
    assert read_origin(tmp_path / "hf") == origin
    assert due(tmp_path, 4) is None


def test_others_are_kept_under_their_own_step(tmp_path: Path) -> None:
    """Prolonged; set back to an earlier checkpoint and trained again, twice; written by somebody
    else."""
    save(tmp_path, 4, "a")
    save(tmp_path, 6, "b")
    first = due(tmp_path, 4)
    for _ in range(2):
        export(tmp_path, first)
        assert due(tmp_path, 6) != first
    export(tmp_path, first)
    save(tmp_path, 4, "another run of step 4")
    assert due(tmp_path, 4) != first
    export(tmp_path, None)
    (tmp_path / ".hf.unfinished-7").mkdir()
    assert due(tmp_path, 4)
    kept = {"hf-step-000004", "hf-step-000004-2", "hf-step-000004-3", "hf-before"}
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints"} | kept


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"step": "x", "checkpoint_sha256": ""}'])
def test_an_unreadable_origin_is_none(content: str, tmp_path: Path) -> None:
    (tmp_path / "origin.json").write_text(content)
    assert read_origin(tmp_path) is None


def test_what_is_made_of_an_export_is_not_of_its_checkpoint(tmp_path: Path) -> None:
    for name in ("origin.json", "config.json", "manifest.json"):
        (tmp_path / name).touch()
    assert [path.name for path in companions(tmp_path)] == ["config.json"]
