"""`make gpu-check SMALL=1` on the host: everything runs, rows are kept, a wrong kernel does not
pass."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from megatron_opd import vocab_parallel
from tools.gpu_check import SECTIONS, Report, rows_of_section
from tools.gpu_sections.machine import Machine

ROOT = Path(__file__).parents[2]
# As on a machine that has the packages of the base alone.
WITHOUT_VLLM = """
import runpy, sys
sys.modules["vllm"] = None
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""
WITH_OTHER_KERNELS = """
import os, sys
os.environ["TRITON_INTERPRET"] = "1"
from importlib import util
from megatron_opd import vocab_parallel
name = "megatron_opd.vocab_parallel.kernels"
spec = util.spec_from_file_location(name, sys.argv.pop(1))
vocab_parallel.kernels = sys.modules[name] = util.module_from_spec(spec)
spec.loader.exec_module(vocab_parallel.kernels)
from tools.gpu_check import main
sys.exit(main())
"""


def gpu_check(*command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    environment.pop("MEGATRON_OPD_DEVICE", None)
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )


def rows_of(path: Path) -> list[dict[str, str]]:
    return json.loads(path.read_text())["rows"]


def test_the_whole_check_runs_small_on_the_host(tmp_path: Path) -> None:
    path = tmp_path / "new" / "check.json"
    done = gpu_check("-c", WITHOUT_VLLM, "tools/gpu_check.py", "--small", "--json", str(path))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = rows_of(path)
    assert list(dict.fromkeys(row["section"] for row in rows)) == list(SECTIONS)
    for section in SECTIONS:
        outcomes = {row["outcome"] for row in rows if row["section"] == section}
        assert ("measured" if section in ("device", "speed") else "passed") in outcomes, section
    assert all(
        row["limit"].startswith("needs a GPU") for row in rows if row["outcome"] == "skipped"
    )
    assert "no GPU is used: kernels are interpreted" in done.stdout
    assert done.stdout.splitlines()[-1].endswith(f"wrote {path}")


def test_a_wrong_kernel_is_reported(tmp_path: Path) -> None:
    """Quotients as CUDA's `/` gives them, and a target's gradient without its own probability."""
    source = Path(vocab_parallel.__file__).with_name("kernels.py").read_text()
    for right, wrong in {
        "tl.div_rn(z, tl.zeros_like(z) + temperature)": "z * (1.0 / temperature)",
        "(grad_of_id - p_at * weight_at)": "grad_of_id",
    }.items():
        assert source.count(right) == 1
        source = source.replace(right, wrong)
    kernels, path = tmp_path / "kernels.py", tmp_path / "check.json"
    kernels.write_text(source)
    done = gpu_check(
        "-c", WITH_OTHER_KERNELS, str(kernels), "--small", "--only", "kernels", "--json", str(path)
    )
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-3000:]
    rows = rows_of(path)
    wrong = [row["what"] for row in rows if row["outcome"] == "FAILED"]
    assert "host's passes, float32, logits of 1e4 at T 1.3: other quotients" in wrong
    assert any("gradient" in what for what in wrong) and not any("best" in what for what in wrong)
    last = done.stdout.splitlines()[-len(wrong) :]
    assert all(
        line.startswith(f"FAILED kernels: {what} = ")
        for line, what in zip(last, wrong, strict=True)
    )


def test_without_a_gpu_only_small_sizes_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "check.json"
    done = gpu_check("tools/gpu_check.py", "--json", str(path))
    assert done.returncode == 2 and not done.stdout and not path.exists()
    (line,) = done.stderr.splitlines()
    assert "no usable CUDA device" in line and "SMALL=1" in line


def test_a_section_that_the_time_is_too_short_for_has_failed(tmp_path: Path) -> None:
    report = Report(tmp_path / "check.json")
    report.take(
        "probes", rows_of_section("probes", Machine(torch.device("cpu"), small=True, deadline=0.0))
    )
    assert [(row["value"], row["outcome"]) for row in rows_of(report.path)] == [
        ("left out", "FAILED")
    ]
    assert len(report.failures) == 1
