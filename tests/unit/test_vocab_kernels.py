"""The Triton kernels, in a process of their own: Triton decides when it is first imported whether it interprets."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def run_worker(**environment: str) -> None:
    worker = Path(__file__).with_name("kernels_worker.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(worker)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "38 passed" in done.stdout, done.stdout


def test_interpreted_kernels_equal_the_torch_passes():
    run_worker(TRITON_INTERPRET="1")


@pytest.mark.gpu
def test_compiled_kernels_equal_the_torch_passes():
    run_worker(TRITON_INTERPRET="0")
