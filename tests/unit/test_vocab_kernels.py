"""The Triton kernels, in a process of their own: Triton decides when it is first imported whether
it interprets."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def run_worker(**environment: str) -> None:
    worker = Path(__file__).with_name("kernels_worker.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(worker)]
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "38 passed" in done.stdout, done.stdout


@pytest.mark.slow
def test_interpreted_kernels_equal_the_torch_passes():
    run_worker(TRITON_INTERPRET="1")


@pytest.mark.gpu
def test_compiled_kernels_equal_the_torch_passes():
    run_worker(TRITON_INTERPRET="0")


@pytest.mark.slow
def test_targets_are_read_before_the_walk_that_overwrites_them():
    """In place, a thread's logit of a target is another thread's to overwrite: a barrier is in the
    code for GPUs."""
    worker = Path(__file__).with_name("ptx_worker.py")
    done = subprocess.run([sys.executable, str(worker)], env=os.environ | {"TRITON_INTERPRET": "0"},
                          capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    for case, events in json.loads(done.stdout).items():
        walk, after = events.index("label"), len(events) - events[::-1].index("label")
        before = events[:walk]
        assert "load" in before and before[-1] == "barrier", case  # none of them after it
        assert "store" not in before, case
        # what the walk wrote, and then the targets
        assert events[after : after + 2] == ["barrier", "store"], case
