"""A run while it goes: its steps as text, and its page, written anew and reloading itself."""

import math
import time
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from megatron_opd.errors import DataError
from megatron_opd.files.lock import in_use
from megatron_opd.metrics.console import StepConsole, open_table
from megatron_opd.metrics.run_directory import Line, metrics_path
from megatron_opd.report.evaluations import read_ends
from megatron_opd.report.headlines import steps_done
from megatron_opd.report.page import write_report
from megatron_opd.report.run import RunRead, read_run
from megatron_opd.report.verdict import verdict_of

_SHOWN_AT_FIRST = 10  # steps that had finished before
_RELOAD_SECONDS = 10
# A page is not written more often than this many times what writing it took.
_REST = 10


def watch_run(run_dir: Path, console: Console | None = None, poll_seconds: float = 1.0) -> None:
    """Shows the steps of a run, until the run ends: a table on a terminal, lines anywhere else.

    Its `report.html` is written anew meanwhile, and reloads itself; the last one does not. Raises
    DataError for what is not a run's directory.
    """
    run = read_run(run_dir)
    planned = run.num_steps or max(steps_done(run.rows), 1)
    shown = open_table(f"{run.name} · {run.method}", planned, console)
    page = _Page(run_dir, shown)
    shown.note(f"watching {run_dir}; the page is {page.path}")
    seen = max(len(run.rows) - _SHOWN_AT_FIRST, 0)
    size = -1
    try:
        while True:
            running = in_use(run_dir)  # before the read, so that a run's last line is read
            new_size = _size(run_dir)
            if new_size != size:
                size = new_size
                run = read_run(run_dir)
                seen = min(seen, len(run.rows))  # a run that went on repeats steps
                for row in run.rows[seen:]:
                    shown.log(row["step"], _numbers(row))
                seen = len(run.rows)
            if running is False or (running is None and run.done):
                break
            page.write_if_due(size)
            time.sleep(poll_seconds)
    finally:
        shown.close()
        page.write_last()
    for line in _last_words(run):
        shown.note(line)


class _Page:
    """The page of a run that goes on."""

    def __init__(self, run_dir: Path, shown: StepConsole) -> None:
        self.path = run_dir / "report.html"
        self._run_dir = run_dir
        self._shown = shown
        self._next = 0.0
        self._size = -1
        self._failure = ""

    def write_if_due(self, size: int) -> None:
        """Writes the page where the run has gone on and the last one was long enough ago."""
        start = time.monotonic()
        if size == self._size or start < self._next:
            return
        self._size = size
        self._write(_RELOAD_SECONDS)
        self._next = time.monotonic() + max(_REST * (time.monotonic() - start), 2.0)

    def write_last(self) -> None:
        """Writes the page as it stays."""
        self._write(0)

    def _write(self, reload_seconds: int) -> None:
        try:
            running = in_use(self._run_dir) is True
            write_report(self._run_dir, running=running, reload_seconds=reload_seconds)
        except (DataError, OSError) as error:
            # The text goes on without the page; a file may also have gone while it was read.
            if str(error) != self._failure:
                self._failure = str(error)
                self._shown.note(f"no page: {error}")


def _size(run_dir: Path) -> int:
    try:
        return metrics_path(run_dir).stat().st_size
    except OSError:
        return 0


def _numbers(row: Line) -> Mapping[str, float]:
    """A line as metrics: what was not finite is NaN again."""
    return {
        key: math.nan if value is None else value
        for key, value in row.items()
        if value is None or isinstance(value, int | float)
    }


def _last_words(run: RunRead) -> list[str]:
    done = steps_done(run.rows)
    if not run.rows:
        return ["ended before a step had finished"]
    ended = "finished" if run.done else f"stopped after step {done} of {run.num_steps}"
    verdict = verdict_of(run.rows, read_ends(run.directory), run.effort)
    return [ended, verdict.sentence]
