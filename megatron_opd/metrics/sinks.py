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
    def decode(self, token_ids: list[int]) -> str: ...


class Sinks:
    """Opens the files of a new run (`resume_step` None) or of one that goes on at `resume_step`.

    On resume, steps >= `resume_step` are dropped first, because they will be repeated. `tokenizer`
    lets the row files carry the text of every token. Raises ConfigError when a new run would
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
        # The first file: with it, and not before, the directory is a run that can be resumed.
        run_directory.write_atomically(self.run_dir / "config.yaml", dump_config(config).encode())
        (self.run_dir / "rollouts").mkdir(exist_ok=True)
        environment = json.dumps(
            describe_environment() | {"resumed_at_step": resume_step}, indent=2
        )
        run_directory.write_atomically(self.run_dir / "env.json", environment.encode() + b"\n")
        self._metrics_file = metrics_file.open("ab")
        self._tensorboard = None
        if config.log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # takes a second to import

            self._tensorboard = SummaryWriter(
                str(self.run_dir / "tensorboard"), purge_step=resume_step
            )
        self._console = open_console(config)

    def log(self, record: StepRecord) -> None:
        """Writes one step. The rows come first: a step in `metrics.jsonl` is complete."""
        if record.rows and self._max_rollouts:
            self._write_rows(record)
        self._metrics_file.write(
            run_directory.encode_line(run_directory.metrics_line(record.step, record.metrics))
        )
        self._metrics_file.flush()
        if self._tensorboard:
            for key, value in record.metrics.items():
                self._tensorboard.add_scalar(key, value, record.step)
            self._tensorboard.flush()
        self._console.log(record.step, record.metrics)

    def sync(self) -> None:
        """Returns when the steps are on disk: before a checkpoint is that builds on them."""
        os.fsync(self._metrics_file.fileno())

    def log_heldout(self, step: int, rows: Sequence[Row]) -> None:
        """The answers of an evaluation of the weights at the start of `step`."""
        path = run_directory.heldout_path(self.run_dir, step)
        path.parent.mkdir(exist_ok=True)
        lines = [run_directory.sample_line(step, row, self._texts(row.token_ids)) for row in rows]
        run_directory.write_atomically(path, b"".join(map(run_directory.encode_line, lines)))

    def note(self, text: str) -> None:
        """One line to the terminal that is not a step: "evaluating 200 held-out prompts"."""
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
        for row in record.rows[: self._max_rollouts]:
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
        """Each token decoded on its own; a token that is a part of a character reads as U+FFFD."""
        if self._tokenizer is None:
            return None
        for token_id in set(token_ids.tolist()) - self._token_texts.keys():
            self._token_texts[token_id] = self._tokenizer.decode([token_id])
        return [self._token_texts[token_id] for token_id in token_ids.tolist()]
