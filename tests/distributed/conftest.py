"""Starts the programs of the distributed tests under torchrun, on gloo."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def run_distributed() -> Callable[..., subprocess.CompletedProcess[str]]:
    """The launcher: `run_distributed(program, nproc, *args, timeout=240)`; any test or fixture can take it."""
    return _run_distributed


def _run_distributed(
    program: str | Path, nproc: int, *args: object, timeout: float = 240, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs `program` (a path ending in .py, or a module name) in `nproc` processes and waits for them.

    Fails the test with the programs' output when they exit non-zero or take more than `timeout` seconds;
    then every process of the run is killed. stdout and stderr of all ranks come back as text.
    """
    target = [str(program)] if str(program).endswith(".py") else ["-m", str(program)]
    # Port 0: torchrun's own store picks a free port, so tests may run side by side.
    rendezvous = ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={nproc}", *rendezvous]
    process = subprocess.Popen(
        [*torchrun, *target, *map(str, args)],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"} | (env or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    problem = ""
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        problem = f"took more than {timeout:g} s"
        os.killpg(process.pid, signal.SIGKILL)
        stdout, stderr = process.communicate()
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    if process.returncode and not problem:
        problem = f"exited with {process.returncode}"
    if problem:
        tail = "\n".join([*stdout.splitlines()[-40:], *stderr.splitlines()[-250:]])
        pytest.fail(f"{program} on {nproc} processes {problem}:\n{tail}", pytrace=False)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)
