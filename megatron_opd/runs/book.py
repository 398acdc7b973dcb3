"""The records of a run: its log, checkpoints, exported student and report."""

import contextlib
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from megatron_opd.contracts.rows import Row, StepRecord
from megatron_opd.contracts.stations import Tokenizer
from megatron_opd.metrics.sinks import Sinks
from megatron_opd.recipe.keys import RunConfig
from megatron_opd.runs import exported
from megatron_opd.runs.resumed import State
from megatron_opd.trainer import checkpoint
from megatron_opd.trainer.student import Student
from megatron_opd.weights.export import export_hf
from megatron_opd.world import processes


class Book:
    """The directory of a run. Rank 0 writes the log; the calls of other ranks do nothing there.

    All ranks construct theirs together, and raise if the directory could not be made.
    `resume_step` is the step at which the run goes on, None for a new run.
    """

    def __init__(
        self,
        config: RunConfig,
        tokenizer: Tokenizer,
        resume_step: int | None,
        closing: contextlib.ExitStack,
    ) -> None:
        self.directory = Path(config.directory)
        self._student_path = config.student.path
        self._keep = config.checkpoint.keep
        self._sinks: Sinks | None = None
        self._carried: dict[str, float] = {}  # metrics of work after a step's record was written

        def open_files() -> None:
            self._sinks = Sinks(self.directory, config, tokenizer, resume_step)
            closing.callback(self._sinks.close)

        processes.from_rank_0(open_files)

    def log(self, record: StepRecord) -> None:
        """Writes one step, with the metrics that were carried over to it."""
        record.metrics |= self._carried
        self._carried = {}
        if self._sinks:
            self._sinks.log(record)

    def log_heldout(self, step: int, rows: Sequence[Row], *, of: str = "") -> None:
        """Writes the answers of an evaluation before `step`; those with skills, and of a further
        set, to a folder of their own."""
        if self._sinks:
            self._sinks.log_heldout(step, rows, of=of)

    def note(self, text: str) -> None:
        """Prints a line that is not a step."""
        if self._sinks:
            self._sinks.note(text)

    def count(self, name: str, number: int) -> None:
        """Adds to a metric of the next record."""
        self._carried[name] = self._carried.get(name, 0) + number

    def save(self, state: State, models: checkpoint.Models) -> None:
        """Writes the checkpoint of `state.step`. Collective."""
        start = time.perf_counter()
        if self._sinks:
            self._sinks.sync()
        directory = self.directory / "checkpoints"
        kept = asdict(state)
        checkpoint.save(directory, kept.pop("step"), models, kept, keep=self._keep)
        self._carried["timing/checkpoint_seconds"] = time.perf_counter() - start

    def export(self, student: Student, step: int) -> None:
        """Writes the student as a Hugging Face directory, `<run>/hf`, unless it is there.

        Collective, after the last save.
        """
        origin = processes.from_rank_0(lambda: exported.due(self.directory, step))
        if origin is None:
            return
        out = self.directory / "hf"
        chunks = student.bare_chunks
        export_hf(chunks, student.arch, student.parallel, self._student_path, out, origin=origin)
        self.note(f"exported {out}, a Hugging Face directory")

    def report(self) -> None:
        """Writes `report.html` and the plots, on rank 0."""
        if self._sinks:
            from megatron_opd.report.page import write_report  # matplotlib takes a second to import

            self.note(f"wrote {write_report(self.directory)}")
