"""The directory of an evaluation while it runs: what was asked, written and graded so far.

Every process appends lines to files of its own; a line that a kill cut short is left out. So an
evaluation that was stopped goes on, with as many processes as one likes, and no sample is drawn
twice.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Self, cast

from megatron_opd.contracts.rows import Verdict
from megatron_opd.errors import ConfigError
from megatron_opd.evaluation.writers import Written
from megatron_opd.files.atomic import write_atomically
from megatron_opd.files.lock import RUN_LOCK, locked
from megatron_opd.files.typed import build, differences
from megatron_opd.suites.asking import SuitePrompt

REQUEST = "request.json"
Key = tuple[str, str, int]  # suite, question, sample


class Store:
    """The lines of an evaluation: `completions.N.jsonl` and `verdicts.N.jsonl` of process N."""

    def __init__(self, directory: Path, process: int) -> None:
        self._directory = directory
        self._process = process
        self._files: dict[str, IO[str]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def keep_completion(self, prompt: SuitePrompt, written: Written) -> None:
        """Appends what was written for a prompt."""
        self._append("completions", {"key": prompt.key, **asdict(written)})

    def keep_verdict(self, key: Key, verdict: Verdict) -> None:
        """Appends what a grader says of a completion."""
        self._append("verdicts", {"key": key, **asdict(verdict)})

    def completions(self) -> dict[Key, Written]:
        """What all processes have written so far."""
        return {key: build(Written, fields) for key, fields in self._lines("completions")}

    def verdicts(self) -> dict[Key, Verdict]:
        """What all processes have graded so far."""
        graded = {}
        for key, fields in self._lines("verdicts"):
            pairs = cast(list[tuple[str, float]], fields.pop("parts"))
            parts = tuple((name, score) for name, score in pairs)
            graded[key] = replace(build(Verdict, fields), parts=parts)
        return graded

    def remove(self) -> None:
        """Deletes the lines, which a result holds."""
        for name in ("verdicts", "completions"):  # none is left without its completion
            for path in self._directory.glob(f"{name}.*.jsonl"):
                path.unlink()

    def _append(self, name: str, line: Mapping[str, object]) -> None:
        if name not in self._files:
            path = self._directory / f"{name}.{self._process}.jsonl"
            _end_torn_line(path)
            self._files[name] = path.open("a", encoding="utf-8")
        # flushed to the system: a killed process loses nothing that it wrote here
        self._files[name].write(json.dumps(line) + "\n")
        self._files[name].flush()

    def _lines(self, name: str) -> Iterator[tuple[Key, dict[str, object]]]:
        for path in sorted(self._directory.glob(f"{name}.*.jsonl")):
            for line in path.read_bytes().split(b"\n"):
                try:
                    fields = json.loads(line)
                except ValueError:  # cut short by a kill; the last, empty piece
                    continue
                suite, question, sample = fields.pop("key")
                yield (suite, question, sample), fields


def _end_torn_line(path: Path) -> None:
    """Ends a last line that a kill cut short, so that the next one begins on its own."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")


@contextmanager
def alone_in(directory: Path) -> Iterator[None]:
    """One evaluation at a time in a directory. Raises ConfigError, naming who is there."""
    with locked(directory, named="--out: ", option="--out "):
        try:
            yield
        finally:
            if len(list(directory.iterdir())) > 1:  # an empty directory goes with its lock
                (directory / RUN_LOCK).unlink(missing_ok=True)


def check_request(directory: Path, request: Mapping[str, object]) -> None:
    """Says what is asked in a new directory; in one that is begun, that it is the same.

    Raises ConfigError, naming the first difference.
    """
    path = directory / REQUEST
    wanted = json.loads(json.dumps(request, default=str))
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"--out {directory}: is a file; give a new directory")
    if not path.exists():
        begun = (RUN_LOCK, path.name, f"{path.name}.tmp")  # the last one after a kill
        if directory.is_dir() and any(one.name not in begun for one in directory.iterdir()):
            raise ConfigError(f"--out {directory}: it holds other files; give a new directory")
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(wanted, indent=1) + "\n").encode())
        return
    there = json.loads(path.read_text(encoding="utf-8"))
    if changed := differences(there, wanted):
        raise ConfigError(
            f"--out {directory}: an evaluation was begun there with another {changed[0]}; give "
            "the same again, or another directory"
        )
