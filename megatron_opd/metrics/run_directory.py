"""The files of a run directory: names, formats, atomic writes, tolerant reads.

`metrics.jsonl` has one flat JSON object per step, `rollouts/step-000123.jsonl` the rows of a step,
one per line, and `heldout/step-000123.jsonl` the answers of an evaluation in the same form.
"""

import contextlib
import errno
import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_opd.contracts.environments import Exchange
from megatron_opd.contracts.rows import Row, Source
from megatron_opd.contracts.signals import TeacherSignals
from megatron_opd.errors import DataError, RunError
from megatron_opd.files.atomic import write_atomically

Line = dict[str, Any]
_REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE)


def metrics_path(run_dir: Path) -> Path:
    return run_dir / "metrics.jsonl"


def rollouts_path(run_dir: Path, step: int) -> Path:
    return run_dir / "rollouts" / f"step-{step:06d}.jsonl"


def heldout_path(run_dir: Path, step: int, of: str = "") -> Path:
    """`of`: "with_skills", or the name of a further set."""
    folder = f"heldout_{of}" if of else "heldout"
    return run_dir / folder / f"step-{step:06d}.jsonl"


def rollout_files(run_dir: Path, folder: str = "rollouts") -> dict[int, Path]:
    """The file of each step, in step order. Files of other names are left out."""
    files = {}
    for path in (run_dir / folder).glob("step-*.jsonl"):
        if match := re.fullmatch(r"step-(\d{6,})", path.stem):
            files[int(match[1])] = path
    return dict(sorted(files.items()))


# ------------------------------------------------------------------------------------------ writing
@contextlib.contextmanager
def disk_may_be_full(directory: Path, remedy: str | None = None) -> Iterator[None]:
    """Turns the error of a full or failing disk into a RunError naming the file and the remedy.

    Without a remedy, `directory` is a run's, which goes on from its last checkpoint and loses
    nothing.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        path = Path(error.filename or directory)
        place = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        free = shutil.disk_usage(place).free / 2**30
        if remedy is None:
            is_run = (directory / "config.yaml").is_file()
            remedy = "go on with --resume" if is_run else "start again"
        raise RunError(
            f"{path}: cannot be written ({error.strerror}, {free:.1f} GiB free there); "
            f"what was saved is whole: make room and {remedy}"
        ) from error


def encode_line(row: Mapping[str, Any]) -> bytes:
    """One line of strict JSON (no NaN literal), floats in `repr` precision."""
    text = json.dumps(row, ensure_ascii=False, allow_nan=False)
    # A lone surrogate cannot be UTF-8; this makes it a JSON escape that reads back as itself.
    return text.encode("utf-8", "backslashreplace") + b"\n"


def metrics_line(step: int, metrics: Mapping[str, float]) -> Line:
    """A step's metrics as a line.

    A NaN or an infinity becomes null, and the key `nonfinite` lists them: "train/loss=nan".
    """
    row: Line = {"step": step}
    nonfinite = []
    for key, value in metrics.items():
        number = value if isinstance(value, int) else float(value)
        if math.isfinite(number):
            row[key] = number
        else:
            row[key] = None
            nonfinite.append(f"{key}={number}")
    if nonfinite:
        row["nonfinite"] = " ".join(nonfinite)
    return row


def sample_line(step: int, row: Row, tokens: list[str] | None) -> Line:
    """A row as a line; `tokens` are the texts of its completion tokens, if a tokenizer is there."""
    by_teacher_T = row.sources == Source.TEACHER
    return {
        "step": step,
        "prompt_index": row.task.index,
        "sample": row.sample,
        "problem": row.task.problem,
        "answer": row.task.answer,
        "prompt": row.task.text,
        "completion": row.text,
        "reward": float(row.reward),
        "reward_reason": row.verdict.reason,
        "correct": row.verdict.correct,
        "finish_reason": row.finish_reason,
        "policy_version": row.version,
        "prompt_token_ids": row.prompt_ids.tolist(),
        "given": row.num_given,
        **({"by_teacher": by_teacher_T.astype(int).tolist()} if by_teacher_T.any() else {}),
        **_of_rewards(row),
        **_of_turns(row),
        "token_ids": row.token_ids.tolist(),
        "tokens": tokens,
        "logprobs": _floats(row.logprobs),
    }


def _of_rewards(row: Row) -> Line:
    """Keys of a row whose data name sources, or whose reward is a sum."""
    keys: Line = {"source": row.task.source} if row.task.source else {}
    if row.episode.verdicts:
        verdicts = row.episode.verdicts
        keys["rewards"] = {name: {"score": v.score, "reason": v.reason} for name, v in verdicts}
    return keys


def _of_turns(row: Row) -> Line:
    """Keys of a row whose episode has several turns, or that an environment wrote into."""
    keys: Line = {}
    if row.episode.turns > 1:
        keys |= {"turn": row.turn, "turns": row.episode.turns, "penalty": row.penalty}
    if not row.written_T.all():
        keys["sources"] = row.sources.tolist()
    if row.exchanges:
        keys |= {
            "task_type": row.episode.task_type,
            "skill": row.episode.skill,
            "ended": row.episode.ended,
            "score": row.verdict.score,
            "exchanges": [_exchange(exchange) for exchange in row.exchanges],
        }
    return keys


def _exchange(exchange: Exchange) -> Line:
    return {
        "observation": exchange.observation.text,
        "action": exchange.action,
        "valid": exchange.valid,
        "reward": exchange.reward,
    }


def teacher_line(signals: TeacherSignals, argmax_tokens: list[str] | None) -> Line:
    """The teacher's signals at the tokens of one row, as a line's entry."""
    return {
        "argmax_ids": signals.argmax_ids_T.tolist(),
        "argmax_tokens": argmax_tokens,
        "logprobs": _floats(signals.logprobs_T),
        "entropy": _floats(signals.entropy_T),
    }


def _floats(array: np.ndarray) -> list[float | None]:
    """The shortest decimals that read back as the same float32; None for what is not finite."""
    return [float(str(value)) if np.isfinite(value) else None for value in array.astype(np.float32)]


def drop_steps_from(run_dir: Path, step: int) -> None:
    """Removes the steps >= `step` of an interrupted run, which will be repeated."""
    kept = [encode_line(row) for row in read_metrics(run_dir) if row["step"] < step]
    write_atomically(metrics_path(run_dir), b"".join(kept))
    heldout = sorted(path.name for path in run_dir.glob("heldout*") if path.is_dir())
    for folder in ("rollouts", *heldout):
        for file_step, path in rollout_files(run_dir, folder).items():
            if file_step >= step:
                path.unlink()


# ------------------------------------------------------------------------------------------ reading
def read_metrics(run_dir: Path) -> list[Line]:
    """All steps in file order. Raises DataError naming a line that is not a step."""
    path = metrics_path(run_dir)
    rows = list(_read_lines(path)) if path.exists() else []
    for row in rows:
        if not isinstance(row.get("step"), int):
            raise DataError(
                f"{path}: a line has no integer `step`; the file was not written by a run"
            )
    return rows


def read_rollouts(path: Path) -> list[Line]:
    """The rows of a step's file. Raises DataError."""
    return list(_read_lines(path))


def _read_lines(path: Path) -> Iterator[Line]:
    lines = path.read_bytes().split(b"\n")
    # Behind the last newline there is nothing, or a line that a killed process did not finish.
    for number, line in enumerate(lines[:-1], start=1):
        try:
            row = json.loads(line, parse_constant=lambda _: None)
        except ValueError as error:
            raise DataError(f"{path}:{number}: not valid JSON ({error}); delete the line") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: not a JSON object; delete the line")
        yield row
