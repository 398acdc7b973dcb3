"""Two processes never work in one run directory, and a process that is gone leaves no lock."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from megatron_opd.cli import main as cli
from megatron_opd.errors import ConfigError
from megatron_opd.files import lock
from tests.unit.tiny_model_files import write_recipe

HOLDER = """
import os, sys, time
from pathlib import Path
from megatron_opd.files import lock
with lock.locked(Path(sys.argv[1])):
    if os.fork() == 0:  # a worker may outlive the run
        os.close(1)
        time.sleep(60)
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    program = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


def test_a_second_process_is_refused_and_told_of_the_first(
    holder: "subprocess.Popen[str]", tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught, lock.locked(tmp_path / "run", seconds=0.2):
        pass
    host = os.uname().nodename
    assert str(caught.value) == (
        f"run_dir: {tmp_path / 'run'} is in use by process {holder.pid} on {host}; wait for its "
        "end or stop it, or give run_dir=..."
    )
    with (
        pytest.raises(ConfigError, match=r"^--out: .*run is in use by .* or give --out \.\.\.$"),
        lock.locked(tmp_path / "run", 0.2, named="--out: ", option="--out "),
    ):
        pass


def test_train_is_refused_before_it_starts_anything(
    holder: "subprocess.Popen[str]",
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(lock, "locked", partial(lock.locked, seconds=0.1))
    recipe = str(write_recipe(tmp_path))
    for nproc in ("1", "2"):
        assert cli.main(["train", recipe, "--nproc", nproc]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"is in use by process {holder.pid}" in line


def test_a_killed_process_leaves_no_lock_even_where_its_children_live(
    holder: "subprocess.Popen[str]", tmp_path: Path
) -> None:
    holder.kill()
    holder.wait()
    with lock.locked(tmp_path / "run", seconds=0):
        assert (tmp_path / "run" / ".lock").is_file()


def test_what_ends_before_it_was_a_run_leaves_no_directory(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), lock.locked(tmp_path / "deep" / "run"):
        raise ZeroDivisionError
    assert not (tmp_path / "deep" / "run").exists()
    with lock.locked(tmp_path / "run"):
        (tmp_path / "run" / "config.yaml").touch()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".lock", "config.yaml"]


def test_a_file_system_without_locks_is_said_and_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lockf(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with lock.locked(tmp_path / "run"):
        pass
    assert (
        capsys.readouterr().err
        == f"megatron-opd: warning: {tmp_path}/run/.lock: no locks there (No locks available)\n"
    )


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(ConfigError, match=r"run_dir: cannot write .* \(Not a directory\)"),
        lock.locked(tmp_path / "file" / "run"),
    ):
        pass
