"""A run that is watched from another process: its lines, its page, its end."""

import io
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from megatron_opd.cli import main as cli
from megatron_opd.errors import DataError
from megatron_opd.files.lock import in_use, locked
from megatron_opd.report.page import write_report
from megatron_opd.report.watch import watch_run

# Writes steps as a run does, and holds the lock meanwhile; it waits for a word behind the first.
_RUN = """
import sys, time
from pathlib import Path
from megatron_opd.files.lock import locked
from megatron_opd.metrics.run_directory import encode_line, metrics_line
run_dir = Path(sys.argv[1])
with locked(run_dir):
    (run_dir / "config.yaml").write_text("name: watched\\nnum_steps: 6\\nmethod: {name: opd}\\n")
    with (run_dir / "metrics.jsonl").open("ab") as file:
        for step in range(int(sys.argv[2])):
            metrics = {"train/loss": float("nan") if step == 1 else 1.0 / (1 + step)}
            metrics["timing/step_seconds"] = 0.5
            file.write(encode_line(metrics_line(step, metrics)))
            file.flush()
            if step == 0:
                print("started", flush=True)
                sys.stdin.readline()
"""


def start(run_dir: Path, steps: int) -> subprocess.Popen[str]:
    """A run whose first step is done; it goes on when it is told to."""
    command = [sys.executable, "-c", _RUN, str(run_dir), str(steps)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    return process


def page_while_running(run: subprocess.Popen[str], path: Path) -> list[str]:
    """Tells the run to go on when its page is there; the page as it was then."""
    pages: list[str] = []

    def wait() -> None:
        while not path.exists():
            time.sleep(0.02)
        pages.append(path.read_text())
        assert run.stdin is not None
        run.stdin.write("go on\n")
        run.stdin.flush()

    threading.Thread(target=wait, daemon=True).start()
    return pages


@pytest.mark.parametrize(("steps", "last"), [(6, "finished"), (3, "stopped after step 3 of 6")])
@pytest.mark.parametrize("terminal", [False, True])
def test_a_run_is_watched_until_it_ends(
    tmp_path: Path, steps: int, last: str, terminal: bool
) -> None:
    run_dir = tmp_path / "run"
    stream = io.StringIO()
    with start(run_dir, steps) as run:
        pages = page_while_running(run, run_dir / "report.html")
        console = Console(file=stream, force_terminal=terminal, width=100, height=30)
        watch_run(run_dir, console, poll_seconds=0.05)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    if terminal:
        assert "watched · opd" in text and f"{steps}/6 steps" in text and "nan" in text
    else:
        lines = text.splitlines()
        shown = [int(line.split("/")[0].split()[1]) for line in lines if line.startswith("step ")]
        assert shown == list(range(steps)) and "loss nan" in text
    assert last in text
    assert 'http-equiv="refresh"' in pages[0]
    assert "running, 1 of 6 steps done" in pages[0]
    page = (run_dir / "report.html").read_text()
    assert 'http-equiv="refresh"' not in page and last in page


def test_the_lock_is_asked_about_without_being_taken(tmp_path: Path) -> None:
    assert in_use(tmp_path) is False
    run_dir = tmp_path / "run"
    with start(run_dir, 1) as run:
        assert in_use(run_dir) is True and in_use(run_dir) is True
        run.communicate("go on\n")
    assert in_use(run_dir) is False
    with locked(run_dir, seconds=0.0):
        pass


def test_a_page_of_a_running_run_does_not_call_it_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    with start(run_dir, 2) as run:
        assert cli.main(["report", str(run_dir)]) == 0
        assert "running, 1 of 6 steps done" in (run_dir / "report.html").read_text()
        run.communicate("go on\n")
    assert "stopped after step 2 of 6" in write_report(run_dir).read_text()


def test_what_cannot_be_watched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match="not a run directory"):
        watch_run(tmp_path)
    assert cli.main(["report", str(tmp_path), str(tmp_path / "b"), "--watch"]) == 2
    assert "--watch: shows one run" in capsys.readouterr().err
