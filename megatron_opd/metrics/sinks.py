"""Writes a step's record to `metrics.jsonl`, `rollouts/`, `heldout/`, TensorBoard and the terminal.

Rank 0 only.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import numpy as np

from megatron_opd.contracts.rows import Row, StepRecord
from megatron_opd.errors import ConfigError
from megatron_opd.metrics import run_directory
from megatron_opd.metrics.console import open_console
from megatron_opd.metrics.machine import describe_environment
from megatron_opd.recipe.keys import RunConfig
from megatron_opd.recipe.load import dump_config


class Tokenizer(Protocol):
    """The one function of a tokenizer that is needed here."""

    def decode(self, token_ids: list[int]) -> str: ...


class Sinks:
    """The open files of a run: of a new one, or of one that goes on at `resume_step`.

    On resume, steps >= `resume_step` are dropped first, because they will be repeated. With a
    `tokenizer` the row files have the text of every token. Raises ConfigError when a new run would
    overwrite an old one.
    """

    def __init__(
        self,
        run_dir: str | Path,
        config: RunConfig,
        tokenizer: Tokenizer | None = None,
        resume_step: int | None = None,
    ) -> None:
        self.run_dir = Path(run_dir)
        self._max_rollouts = config.log.rollouts_per_step
        self._tokenizer = tokenizer
        self._token_texts: dict[int, str] = {}
        metrics_file = run_directory.metrics_path(self.run_dir)
        if resume_step is not None:
            run_directory.drop_steps_from(self.run_dir, resume_step)
        elif metrics_file.exists():
            raise ConfigError(
                f"run_dir: {run_dir} already holds a run; pass --resume or choose another directory"
            )
        self.run_dir.mkdir(parents=True, exist_ok=True)
        # Written first: this file makes the directory a run that can be resumed.
        run_directory.write_atomically(self.run_dir / "config.yaml", dump_config(config).encode())
        (self.run_dir / "rollouts").mkdir(exist_ok=True)
        environment = describe_environment() | {"resumed_at_step": resume_step}
        text = json.dumps(environment, indent=2) + "\n"
        run_directory.write_atomically(self.run_dir / "env.json", text.encode())
        self._metrics_file = metrics_file.open("ab")
        self._tensorboard = None
        if config.log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # takes a second to import

            folder = str(self.run_dir / "tensorboard")
            self._tensorboard = SummaryWriter(folder, purge_step=resume_step)
        self._console = open_console(config)

    def log(self, record: StepRecord) -> None:
        """Writes one step, its rows first, so that a step in `metrics.jsonl` is whole."""
        if record.rows and self._max_rollouts:
            self._write_rows(record)
        line = run_directory.metrics_line(record.step, record.metrics)
        self._metrics_file.write(run_directory.encode_line(line))
        self._metrics_file.flush()
        if self._tensorboard:
            for key, value in record.metrics.items():
                self._tensorboard.add_scalar(key, value, record.step)
            self._tensorboard.flush()
        self._console.log(record.step, record.metrics)

    def sync(self) -> None:
        """Returns when the steps are on disk, which they must be before a checkpoint of them is."""
        os.fsync(self._metrics_file.fileno())

    def log_heldout(self, step: int, rows: Sequence[Row], *, of: str = "") -> None:
        """Writes the answers of an evaluation of the weights at the start of `step`."""
        path = run_directory.heldout_path(self.run_dir, step, of)
        path.parent.mkdir(exist_ok=True)
        lines = [run_directory.sample_line(step, row, self._texts(row.token_ids)) for row in rows]
        run_directory.write_atomically(path, b"".join(map(run_directory.encode_line, lines)))

    def note(self, text: str) -> None:
        """Prints a line that is not a step: "evaluating 200 held-out prompts"."""
        self._console.note(text)

    def close(self) -> None:
        self._console.close()
        self._metrics_file.close()
        if self._tensorboard:
            self._tensorboard.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _write_rows(self, record: StepRecord) -> None:
        lines = []
        start = 0
        for row in _whole_episodes(record.rows, self._max_rollouts):
            stop = start + row.num_tokens
            line = run_directory.sample_line(record.step, row, self._texts(row.token_ids))
            if record.teacher:
                part = record.teacher.part(slice(start, stop))
                line["teacher"] = run_directory.teacher_line(part, self._texts(part.argmax_ids_T))
            lines.append(run_directory.encode_line(line))
            start = stop
        path = run_directory.rollouts_path(self.run_dir, record.step)
        run_directory.write_atomically(path, b"".join(lines))

    def _texts(self, token_ids: np.ndarray) -> list[str] | None:
        """The text of each token alone; a fraction of a character reads as U+FFFD."""
        if self._tokenizer is None:
            return None
        for token_id in set(token_ids.tolist()) - self._token_texts.keys():
            self._token_texts[token_id] = self._tokenizer.decode([token_id])
        return [self._token_texts[token_id] for token_id in token_ids.tolist()]


def _whole_episodes(rows: Sequence[Row], at_most: int) -> list[Row]:
    """The first rows, up to the end of the episode in which `at_most` are reached."""
    last = rows[:at_most][-1].episode.key
    return [row for place, row in enumerate(rows) if place < at_most or row.episode.key == last]
