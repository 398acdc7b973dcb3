"""A teacher on processes of its own: signals and updates are as on one, and neither side outlives
the other."""

import json
import os
import shutil
import signal
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_opd.world.torchrun import run_workers
from tests.distributed import test_layout_invariance as replayed
from tests.distributed import test_parity_matrix as parity

STEPS, K = 3, 5
TP2, PP2, SP2, EP2 = parity.TP2, parity.PP2, parity.SP2, parity.EP2
SIGNALS = ("logprobs_T", "entropy_T", "topk_logprobs_TK")


@dataclass(frozen=True)
class Case:
    teacher: str  # a model directory
    processes: int = 0  # the teacher's own
    student_layout: dict[str, Any] = field(default_factory=dict)
    teacher_layout: dict[str, Any] = field(default_factory=dict)


ALONE = {"teacher": Case("teacher"), "MoE": Case("MoE")}
# processes -> name -> case; all of one number of processes set as many aside
APART: dict[int, dict[str, Case]] = {
    3: {"TP2 | 1": Case("teacher", 1, TP2)},
    4: {
        "DP2 | TP2": Case("teacher", 2, {}, TP2),
        "DP2 | TP2+SP x EP2": Case("MoE", 2, {}, SP2 | EP2),
        "PP2 | DP2 x EP2": Case("MoE", 2, PP2, EP2),
    },
}
CASES = {name: case for cases in APART.values() for name, case in cases.items()}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("apart")
    parity.make_models(directory)
    for model in directory.iterdir():
        vocabulary = {f"w{i}": i for i in range(replayed.VOCAB)}
        (model / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    return directory


@pytest.fixture(scope="module")
def results(directory: Path, run_distributed: Any) -> dict[str, Any]:
    for nproc in (1, *APART):
        run_distributed(__file__, nproc, "compare", directory)
    return {path.stem: torch.load(path, weights_only=False) for path in directory.glob("*.pt")}


@pytest.mark.parametrize("name", CASES)
def test_signals_and_updates_are_those_of_one_process(results: dict[str, Any], name: str) -> None:
    got, want = results[name], results[CASES[name].teacher]
    for column in ("argmax_ids_T", "topk_ids_TK"):
        np.testing.assert_array_equal(
            getattr(got["signals"], column), getattr(want["signals"], column)
        )
    for column in SIGNALS:
        np.testing.assert_allclose(
            getattr(got["signals"], column), getattr(want["signals"], column), rtol=0, atol=1e-5
        )
    assert len(got["updates"]) == STEPS
    for mine, one in zip(got["updates"], want["updates"], strict=True):
        for key in ("train/loss", "train/grad_norm"):
            assert mine[key] == pytest.approx(one[key], rel=1e-5), key
    assert got["parameters"].keys() == want["parameters"].keys()
    for tensor, value in want["parameters"].items():
        assert (got["parameters"][tensor] - value).norm() <= 1e-5 * value.norm(), tensor


def test_a_teacher_that_says_otherwise_is_seen(results: dict[str, Any]) -> None:
    first, second = (results[name]["signals"] for name in ALONE)
    assert np.abs(first.logprobs_T - second.logprobs_T).max() > 0.1
    assert (
        results["teacher"]["updates"][0]["train/loss"] != results["MoE"]["updates"][0]["train/loss"]
    )


# ----------------------------------------------------------------------------------------- failures
FAILURES = {
    "unreadable": (2, "tensor model.norm.weight is missing"),
    "teacher raises": (1, "ValueError: no room"),
    "teacher killed": (1, "the process of rank 2 was killed by SIGKILL"),
    "student killed": (1, "the process of rank 0 was killed by SIGKILL"),
}


@pytest.mark.parametrize("how", FAILURES)
def test_where_one_side_fails_the_other_ends(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    if how == "unreadable":
        from safetensors.torch import load_file, save_file

        shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
        weights = tmp_path / "teacher" / "model.safetensors"
        save_file(
            {k: v for k, v in load_file(weights).items() if k != "model.norm.weight"},
            weights,
            {"format": "pt"},
        )
        directory = tmp_path
    code, message = run_workers(3, [__file__, how, str(directory), str(tmp_path)])
    assert (code, FAILURES[how][1] in message) == (FAILURES[how][0], True), message
    pids = [int(path.read_text()) for path in tmp_path.glob("pid*")]
    assert len(pids) == 3
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    failed = min(float(path.read_text()) for path in tmp_path.glob("failed*"))
    assert time.time() - failed < 40  # torchrun's own grace is 30 s


# -------------------------------------------------------------------------------------- the program
def config_of(directory: Path, case: Case) -> Any:
    from megatron_opd.architectures.config import LayoutConfig, ModelConfig
    from megatron_opd.recipe.keys import (
        DataConfig,
        OptimizerConfig,
        RunConfig,
        TeacherConfig,
        TrainConfig,
    )

    return RunConfig(
        name="apart",
        num_steps=STEPS,
        max_sequence_length=64,
        method=replayed.method_of("tgpo"),
        precision="float32",
        student=ModelConfig(str(directory / "dense"), layout=LayoutConfig(**case.student_layout)),
        teacher=TeacherConfig(
            str(directory / case.teacher),
            layout=LayoutConfig(**case.teacher_layout),
            processes=case.processes or None,
        ),
        data=DataConfig(""),
        train=TrainConfig(
            OptimizerConfig(lr=1e-2, adam_eps=1e-3, weight_decay=0.1), micro_batch_tokens=60
        ),
    )


def compare(directory: Path, cases: dict[str, Case]) -> None:
    """In the student's processes: everything the tests compare."""
    from megatron_opd.doctor.measure import updates
    from megatron_opd.runs.assemble import assemble

    rows = replayed.recorded_rows()
    for name, case in cases.items():
        learner = assemble(config_of(directory, case))
        assert learner.judges.teacher is not None
        signals = learner.judges.teacher.score(rows, K)
        done = updates(learner, rows, steps=STEPS)
        parameters = {tensor: value.clone() for tensor, value in learner.tensors()}
        if torch.distributed.get_rank() == 0:
            found = {"signals": signals, "updates": done, "parameters": parameters}
            torch.save(found, directory / f"{name}.pt")


def fail(directory: Path, out: Path, how: str) -> None:
    """In the student's processes."""
    from megatron_opd.runs.assemble import assemble

    teacher = assemble(config_of(directory, Case("teacher", 1))).judges.teacher
    rows = replayed.recorded_rows()
    assert teacher is not None
    teacher.score(rows)
    if how == "student killed" and torch.distributed.get_rank() == 0:
        die(out)
    teacher.score(rows)


def die(out: Path) -> None:
    (out / f"failed{os.environ['RANK']}").write_text(str(time.time()))
    os.kill(os.getpid(), signal.SIGKILL)


def fail_in_the_second_score(out: Path, how: str) -> None:
    """In the teacher's process."""
    from megatron_opd.teacher.score import MegatronTeacher

    score, calls = MegatronTeacher.score, iter(range(100))

    def failing(self: MegatronTeacher, *arguments: Any) -> Any:
        second = next(calls) == 1
        if second and how == "teacher killed":
            die(out)
        if second and how == "teacher raises":
            raise ValueError("no room")
        return score(self, *arguments)

    MegatronTeacher.score = failing  # type: ignore[method-assign]


def main(how: str, directory: Path, out: Path) -> int:
    from megatron_opd.errors import OpdError
    from megatron_opd.runs.roles import run_in_role
    from megatron_opd.world.torchrun import record_outcome

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if how == "compare":
        cases = APART.get(world, ALONE)
        run_in_role(
            config_of(directory, next(iter(cases.values()))), partial(compare, directory, cases)
        )
        return 0
    (out / f"pid{rank}").write_text(str(os.getpid()))
    fail_in_the_second_score(out, how)
    try:
        run_in_role(config_of(directory, Case("teacher", 1)), partial(fail, directory, out, how))
    except OpdError as error:
        (out / f"failed{rank}").write_text(str(time.time()))
        return record_outcome(error.exit_code, str(error))
    return record_outcome(0, "")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[-1])))
