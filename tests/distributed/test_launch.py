"""Starting workers under torchrun: exit codes arrive, Ctrl-C lets them save, and nothing is left
behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_opd.world.torchrun import run_workers

REPOSITORY = Path(__file__).parents[2]
WORKER = str(Path(__file__).with_name("launched_worker.py"))
STARTER = """
import sys
from megatron_opd.world.torchrun import run_workers
code, message = run_workers(2, sys.argv[1:])
print(message)
sys.exit(code)
"""


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], "subprocess.Popen[str]"]]:
    """Starts the workers from a process of their own, and waits until both run."""
    started = []

    def run(ending: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", STARTER, WORKER, ending, str(tmp_path)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        until(
            lambda: (
                len(list(tmp_path.glob("pid*"))) == 2
                and all(pid.read_text() for pid in tmp_path.glob("pid*"))
            )
        )
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


def until(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.05)


def workers_gone(folder: Path) -> bool:
    return not any(Path(f"/proc/{path.read_text()}").exists() for path in folder.glob("pid*"))


MODULE = "tests.distributed.launched_worker"


@pytest.mark.parametrize("program", [[WORKER], ["-m", MODULE]], ids=["file", "module"])
def test_options_reach_the_program_and_not_torchrun(program: list[str], tmp_path: Path) -> None:
    """Torchrun has options that begin with --n, --log and -m itself."""
    options = ["--nproc", "2", "--log", "x", "-m", "y"]
    assert run_workers(2, [*program, "ok", str(tmp_path), *options]) == (0, "")
    assert {path.read_text() for path in tmp_path.glob("options*")} == {" ".join(options)}
    assert len(list(tmp_path.glob("options*"))) == 2


def test_the_failing_rank_is_the_one_reported(tmp_path: Path) -> None:
    assert run_workers(2, [WORKER, "rank1", str(tmp_path)]) == (2, "rank 1 cannot read its data")
    assert workers_gone(tmp_path)


def test_a_killed_rank_is_reported(tmp_path: Path) -> None:
    assert run_workers(2, [WORKER, "crash", str(tmp_path)]) == (
        1,
        "the process of rank 1 was killed by SIGKILL",
    )
    assert workers_gone(tmp_path)


def test_ctrl_c_waits_until_every_rank_has_saved(start: Callable, tmp_path: Path) -> None:
    starter = start("wait")
    starter.send_signal(signal.SIGINT)
    output, _ = starter.communicate(timeout=60)
    assert (starter.returncode, output) == (130, "saved\n")
    assert {path.name for path in tmp_path.glob("saved*")} == {"saved0", "saved1"}


def test_a_second_ctrl_c_kills(start: Callable, tmp_path: Path) -> None:
    starter = start("stubborn")
    starter.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert starter.poll() is None
    starter.send_signal(signal.SIGINT)
    assert starter.wait(timeout=60) == 130
    until(lambda: workers_gone(tmp_path), 10)


def test_nothing_outlives_a_killed_parent(start: Callable, tmp_path: Path) -> None:
    starter = start("stubborn")
    os.kill(starter.pid, signal.SIGKILL)
    until(lambda: workers_gone(tmp_path), 60)
