"""Teacher traces: a model's own responses to a recipe's training prompts, as a Parquet file."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_opd import __version__
from megatron_opd.architectures.config import ModelConfig
from megatron_opd.architectures.directory import common_vocabulary
from megatron_opd.architectures.ends import merged_ends
from megatron_opd.contracts.merged_ids import MergedIds
from megatron_opd.contracts.rows import Row, Task, with_episodes
from megatron_opd.contracts.sampling import Draw
from megatron_opd.contracts.stations import Sampler, Verifier
from megatron_opd.errors import ConfigError, RunError
from megatron_opd.evaluation.sampler import open_model
from megatron_opd.recipe.keys import RunConfig
from megatron_opd.rollout.single_turn import SingleTurn
from megatron_opd.tasks.data import load_training, training_parts
from megatron_opd.tasks.data_files import shown
from megatron_opd.tasks.pin import pin
from megatron_opd.tasks.tokenizer import load_tokenizer

Keep = Literal["first", "shortest", "all"]


def write_traces(
    config: RunConfig,
    model: ModelConfig,
    out: Path,
    *,
    samples: int,
    temperature: float,
    keep: Keep = "first",
    verified: bool = True,
) -> None:
    """Samples up to `samples` responses per prompt, and keeps right ones that ended by themselves.

    `keep` is the first one of a prompt, for which no more are sampled; the shortest one; or all.
    Not `verified`: whether they are right or wrong; the data then needs no gold answers. Columns:
    problem, answer, response (text), sample, and token_ids where the student has the model's
    vocabulary. The file's metadata (key `megatron-opd`) says where it comes from. Prompts without
    such a response are left out. Raises ConfigError when `out` exists or is not a .parquet,
    RunError when nothing was kept.
    """
    check_out(out)
    config = pin(config)
    tokenizer = load_tokenizer(model.path)
    parts = load_training(config, tokenizer, need_answer=verified, need_trace=False)
    tasks = [task for of_part in parts.values() for task in of_part]
    with open_model(config, model, tokenizer) as opened:
        sampler = SingleTurn(opened.engine, tokenizer)
        judge = opened.verifier if verified else None
        kept = traces_of(tasks, sampler, judge, config, samples, temperature, keep)
    if not kept:
        failed = "was right" if verified else "ended by itself"
        raise RunError(
            f"{model.path}: no response to the {len(tasks)} prompts of "
            f"{shown(training_paths(config))} {failed}"
        )
    same_tokens = common_vocabulary(Path(config.student.path), Path(model.path)) is None
    merged = merged_ends(config.student.path, model.path)
    if merged:  # a trace ends as the student's own responses do
        kept = [replace(r, token_ids=with_students_end(r.token_ids, merged)) for r in kept]
    provenance = _provenance(config, model.path, samples, temperature, len(tasks)) | {
        "verified": verified,
        "keep": keep,
    }
    _write(out, kept, provenance, with_tokens=same_tokens)
    answered = len({row.task.index for row in kept})
    print(f"{out}: {len(kept)} traces for {answered} of {len(tasks)} prompts")


def check_out(out: Path) -> None:
    if out.suffix != ".parquet":
        raise ConfigError(f"--out: {out} must end in .parquet")
    if out.exists():
        raise ConfigError(f"--out: {out} exists already; give another file, or remove it")
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"--out: {out.absolute().parent} is not a directory")


def traces_of(
    tasks: list[Task],
    sampler: Sampler,
    verifier: Verifier | None,
    config: RunConfig,
    samples: int,
    temperature: float,
    keep: Keep,
) -> list[Row]:
    """The traces of every prompt that has some, in the order of the prompts.

    A trace ended by itself and, where there is a `verifier`, is right. Every prompt is sampled
    once, then again: where the first trace is kept, those without one.
    """
    kept: dict[int, list[Row]] = {}
    size = config.rollout.num_prompts
    start = time.perf_counter()
    for round_ in range(samples if temperature > 0 else 1):
        open_ = [task for task in tasks if keep != "first" or task.index not in kept]
        for first in range(0, len(open_), size):
            draw = Draw(
                seed=config.seed,
                step=round_,  # every round draws anew
                version=0,
                samples=1,
                max_tokens=config.rollout.max_completion_tokens,
                temperature=temperature,
                stop=tuple(config.rollout.stop),
            )
            answers = sampler.sample(open_[first : first + size], draw)
            ended = [row for row in answers if row.finish_reason == "stop"]
            good = with_episodes(ended, partial(replace, sample=round_))
            if verifier:
                good = [row for row in verifier.score(good) if row.verdict.correct]
            for row in good:
                kept.setdefault(row.task.index, []).append(row)
            done = min(first + size, len(open_))
            print(
                f"sample {round_ + 1} of {samples}: {done}/{len(open_)} prompts, {len(kept)} "
                f"with traces, {time.perf_counter() - start:.0f} s",
                flush=True,
            )
    traces: list[Row] = []
    for task in tasks:
        traces += chosen(kept.get(task.index, []), keep, lambda row: row.num_tokens)
    return traces


def chosen[T](right: Sequence[T], keep: Keep, length: Callable[[T], int]) -> list[T]:
    """Which right responses to a question are kept, of all in the order of their samples."""
    match keep:
        case "all":
            return list(right)
        case "first":
            return list(right[:1])
        case "shortest":  # the first of equal length
            return sorted(right, key=length)[:1]


def with_students_end(token_ids: np.ndarray, merged: MergedIds) -> np.ndarray:
    """The tokens of a finished response, its end replaced if the teacher alone has it."""
    if token_ids[-1] not in merged.ids:
        return token_ids
    return np.append(token_ids[:-1], np.int32(merged.into))


def _provenance(
    config: RunConfig, model_dir: str, samples: int, temperature: float, num_tasks: int
) -> dict[str, Any]:
    return {
        "megatron_opd": __version__,
        "model": str(Path(model_dir).resolve()),
        "model_config_sha256": _sha256(Path(model_dir) / "config.json"),
        "tokenizer_sha256": _sha256(Path(model_dir) / "tokenizer.json"),
        "data": training_paths(config),
        "data_sha256": config.data.sha256,
        "template": asdict(config.data.template),
        "prompts": num_tasks,
        "samples": samples,
        "temperature": temperature,
        "max_completion_tokens": config.rollout.max_completion_tokens,
        "seed": config.seed,
    }


def training_paths(config: RunConfig) -> str | list[str]:
    """The paths of the training data, as the recipe writes them."""
    parts = training_parts(config.data)
    if "" in parts:
        return parts[""].paths
    listed = [[p.paths] if isinstance(p.paths, str) else p.paths for p in parts.values()]
    return [path for paths in listed for path in paths]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(out: Path, kept: list[Row], provenance: dict[str, Any], *, with_tokens: bool) -> None:
    columns: dict[str, list[Any]] = {
        "problem": [r.task.problem for r in kept],
        "answer": [r.task.answer for r in kept],
        "response": [r.text for r in kept],
        "sample": [r.sample for r in kept],
    }
    if with_tokens:
        columns["token_ids"] = [r.token_ids.tolist() for r in kept]
    write_columns(out, columns, provenance)


def write_columns(
    out: Path, columns: Mapping[str, list[Any]], provenance: Mapping[str, object]
) -> None:
    """Writes a file of traces whole or not at all, with where it comes from in its metadata."""
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table(dict(columns)).replace_schema_metadata(
        {"megatron-opd": json.dumps(provenance, default=str)}
    )
    partial = out.with_name(f".{out.name}.partial")
    pyarrow.parquet.write_table(table, partial)
    partial.replace(out)
