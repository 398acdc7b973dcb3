"""Weights from one directory format to the other: Hugging Face's and Megatron's.

    .OUT.partial/       while it is being written; the same command, given again, goes on with its
                        whole files
      conversion.json   what is converted to what
      NAME.done         beside every file that is on disk and was read back: its size, SHA-256 and
                        contents

Files are independent of each other, so processes share them out and need not speak to each other.
The process that the user started checks the source's checksums meanwhile, and completes the
directory in the end.
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from megatron_opd.architectures.architecture import (
    Architecture,
    architecture_of,
    config_changes,
    read_architecture,
)
from megatron_opd.conversion.directions import Conversion, ToHf, ToMegatron
from megatron_opd.conversion.sealed import DONE, Report, write_files
from megatron_opd.errors import DataError, Interrupted
from megatron_opd.files.manifest import (
    MANIFEST,
    FileRecord,
    damage_of,
    read_manifest,
    sync,
    write_manifest,
)
from megatron_opd.recipe.load import load_config
from megatron_opd.weights.distributed import DistributedCheckpoint
from megatron_opd.weights.hf import INDEX, check_out_dir, copy_companions
from megatron_opd.weights.load import check_hf
from megatron_opd.weights.table import hf_shapes, weight_table
from megatron_opd.world import torchrun
from megatron_opd.world.worker import raise_outcome

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_JOB = "conversion.json"
_SMALL = 2**24  # bytes
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Job:
    """A conversion, its source, and the directory of the model's config and tokenizer."""

    conversion: Conversion
    source: Path
    companions: Path
    arch: Architecture
    config_changes: dict[str, Any] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """The properties that a conversion to be continued must share with this one."""
        files = sorted(path for path in self.source.rglob("*") if path.is_file())
        stats = {
            str(path.relative_to(self.source)): [path.stat().st_size, path.stat().st_mtime_ns]
            for path in files
        }
        names = list(self.conversion.files)
        return {
            "source": str(self.source.resolve()),
            "dtype": str(self.conversion.dtype),
            "files": names,
            **stats,
        }


def convert(source: str, out: str, *, dtype: str | None = None, nproc: int = 1) -> Path:
    """Writes the weights of `source` to `out` in the other format.

    `dtype` is a key of DTYPES; None keeps that of the source. `source` is a Hugging Face
    directory, one that `convert` wrote, or RUN/checkpoints/step-NNNNNN, whatever its layout. Every
    tensor is read back and compared bit for bit; `out` appears when all is well. Raises
    DataError when `source` is not a whole model or `out` exists, RunError when a file does not read
    back.
    """
    target = Path(out)
    check_out_dir(target)
    job = open_job(Path(source), dtype)
    partial = _partial(target)
    with contextlib.ExitStack() as closing:
        closing.enter_context(_locked(partial))
        _keep_only_what_belongs_to(job, partial)
        pool = ThreadPoolExecutor(2)
        closing.callback(pool.shutdown, cancel_futures=True)
        manifest = (read_manifest(job.source) or {}).items()
        checks = [
            pool.submit(_check_file, job.source, name, expected) for name, expected in manifest
        ]
        try:
            if nproc > 1:
                _launch(nproc, source, out, dtype)
            else:
                report = closing.enter_context(_reporter(job))
                write_files(
                    job.conversion, partial, list(job.conversion.files), report, pool, checks
                )
            for check in checks:
                check.result()
        except DataError:
            pool.shutdown(cancel_futures=True)  # it may still be writing there
            shutil.rmtree(partial)
            raise
        except KeyboardInterrupt:
            raise Interrupted(
                f"stopped; the same command goes on with what {partial} holds"
            ) from None
        _complete(job, partial, target)
    count = len(hf_shapes(weight_table(job.arch)))
    print(
        f"{target}: {count} tensors in {_NAMES[job.conversion.dtype]}, each read back and compared"
    )
    return target


def work(source: str, out: str, *, dtype: str | None) -> None:
    """Writes this process's share of the files: one of several that `convert` started."""
    job = open_job(Path(source), dtype)
    rank = int(os.environ["RANK"])
    size = int(os.environ["WORLD_SIZE"])
    names = list(job.conversion.files)[rank::size]
    with ThreadPoolExecutor(1) as pool:
        write_files(job.conversion, _partial(Path(out)), names, _line(job), pool, [])


# --------------------------------------------------------------------------------------- the source
def open_job(source: Path, dtype: str | None) -> Job:
    """The conversion of what `source` holds, whose headers and file sizes are checked.

    Raises DataError.
    """
    if not source.is_dir():
        there = ", ".join(sorted(path.name for path in source.parent.glob("step-*")))
        raise DataError(f"{source}: no such directory" + (f"; there are {there}" if there else ""))
    if (source / "model").is_dir() or (source / "state.json").is_file():
        return _from_megatron(source, dtype)
    if (source / INDEX).is_file() or any(source.glob("*.safetensors")):
        return _from_hf(source, dtype)
    raise DataError(
        f"{source}: holds neither safetensors nor a Megatron checkpoint; "
        "give a Hugging Face directory or RUN/checkpoints/step-NNNNNN"
    )


def _from_hf(source: Path, dtype: str | None) -> Job:
    arch = read_architecture(source)
    if read_manifest(source) is not None:  # `convert` wrote it
        _refuse_at_once(source)
    checkpoint = check_hf(source, arch)
    stored = {checkpoint.dtypes[name] for name in hf_shapes(weight_table(arch))}
    return Job(ToMegatron(checkpoint, arch, _dtype(dtype, stored, source)), source, source, arch)


def _from_megatron(source: Path, dtype: str | None) -> Job:
    recipe = source.parent.parent / "config.yaml"
    _refuse_at_once(source)
    changes: dict[str, Any] = {}
    if (source / "config.json").is_file():
        companions = source
        arch = read_architecture(source)
    elif recipe.is_file():
        student = load_config(str(recipe), []).student
        companions = Path(student.path)
        arch = architecture_of(student)
        changes = config_changes(companions, arch)
    else:
        raise DataError(
            f"{source}: not a checkpoint of a run (no {recipe}); give RUN/checkpoints/step-NNNNNN"
        )
    checkpoint = DistributedCheckpoint(source / "model")
    stored = {checkpoint.check(arch)}
    return Job(
        ToHf(checkpoint, arch, _dtype(dtype, stored, source)), source, companions, arch, changes
    )


def _dtype(name: str | None, stored: set[Any], source: Path) -> torch.dtype:
    if name is not None:
        return DTYPES[name]
    if len(stored) > 1 or not stored <= set(_NAMES):
        dtypes = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in stored))
        raise DataError(f"{source}: holds tensors of {dtypes}; choose what to write with --dtype")
    return stored.pop()


def _refuse_at_once(source: Path) -> None:
    """Refuses missing files, wrong sizes and damaged small files, by which the others are read."""
    manifest = read_manifest(source)
    if manifest is None:
        raise DataError(
            f"{source}: {MANIFEST} is missing or unreadable; give a checkpoint that was written to "
            "its end"
        )
    for name, expected in manifest.items():
        _check_file(source, name, expected, contents=expected["bytes"] < _SMALL)


def _check_file(source: Path, name: str, expected: FileRecord, *, contents: bool = True) -> None:
    if problem := damage_of(source, name, expected, contents=contents):
        raise DataError(f"{source}: {problem}; convert another checkpoint, or copy this one again")


# ------------------------------------------------------------------------------------ the directory
def _partial(target: Path) -> Path:
    return target.with_name(f".{target.name}.partial")


@contextlib.contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """The directory for this process alone. The kernel unlocks it however the process ends."""
    partial.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise DataError(
            f"{partial}: another process is writing it; wait for that one, or name another OUT"
        ) from None
    finally:
        os.close(descriptor)


def _keep_only_what_belongs_to(job: Job, partial: Path) -> None:
    wanted = job.describe()
    try:
        same = json.loads((partial / _JOB).read_text()) == wanted
    except (OSError, ValueError):
        same = False
    if not same:
        for path in partial.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        (partial / _JOB).write_text(json.dumps(wanted))
    for name in job.conversion.files:
        (partial / name).parent.mkdir(exist_ok=True)


def _complete(job: Job, partial: Path, target: Path) -> None:
    """Adds index, config, tokenizer and manifest, and gives the directory its name."""
    done = {name: partial / (name + DONE) for name in job.conversion.files}
    seals = {name: json.loads(path.read_text()) for name, path in done.items()}
    job.conversion.finish(partial, {name: seal["records"] for name, seal in seals.items()})
    copy_companions(job.companions, partial, job.conversion.dtype, job.config_changes)
    for path in [*done.values(), partial / _JOB]:
        path.unlink()
    write_manifest(partial, {name: seal["file"] for name, seal in seals.items()})
    check_out_dir(target)
    partial.rename(target)
    sync(target.parent)


# ------------------------------------------------------------------------------ processes, progress
def _launch(nproc: int, source: str, out: str, dtype: str | None) -> None:
    options = ["--dtype", dtype] if dtype else []
    raise_outcome(
        *torchrun.run_workers(nproc, ["-m", "megatron_opd", "convert", source, out, *options])
    )


@contextlib.contextmanager
def _reporter(job: Job) -> Iterator[Report]:
    """A progress bar on a terminal, a line per file anywhere else."""
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal or console.is_dumb_terminal:
        yield _line(job)
        return
    with Progress(console=console) as progress:
        task = progress.add_task(job.source.name, total=len(job.conversion.files))
        yield lambda name, size, kept: progress.advance(task)


def _line(job: Job) -> Report:
    numbers = {name: number for number, name in enumerate(job.conversion.files, start=1)}

    def report(name: str, size: int, kept: bool) -> None:
        how = "was there already" if kept else "written"
        print(f"{numbers[name]}/{len(numbers)} {name}: {size / 1e9:.2f} GB {how}", flush=True)

    return report
