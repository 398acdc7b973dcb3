"""Checkpoints that are whole or absent: written under another name, sealed by checksums, renamed.

    checkpoints/step-000050/
      model/         Megatron distributed checkpoint: weights and optimizer
      process/       likewise, of a model trained beside the student (PRIME)
      teacher/       the weights of a self-teacher that follows the student
      state.json     step, data position, position in the learning-rate schedule, loss scale
      manifest.json  size and SHA-256 of every file; its presence under the final name makes the
                     checkpoint complete

A checkpoint of any layout loads in any other, on any number of processes. No generator has a state
to keep: dropout is 0, and every draw is a function of (seed, step, task, sample).
"""

import contextlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.api import CheckpointException

from megatron_opd.architectures.architecture import Architecture
from megatron_opd.errors import DataError, RunError
from megatron_opd.files.manifest import checkpoint_steps, find_damage, sync, write_manifest
from megatron_opd.mcore.parallel import Parallel
from megatron_opd.trainer import optimizer_state
from megatron_opd.trainer.student import Student
from megatron_opd.trainer.weight_copy import WeightCopy
from megatron_opd.weights import stored
from megatron_opd.weights.distributed import DistributedCheckpoint

_PREFIX = "step-"
_STATE = "state.json"
# "model" is the student, "process" a model trained beside it, "teacher" a copy of its weights
Models = Mapping[str, Student | WeightCopy]


def save(directory: Path, step: int, models: Models, state: dict[str, Any], *, keep: int) -> Path:
    """Writes checkpoint `step` (steps done) and removes all but the newest `keep`. Collective.

    Raises RunError when it cannot be written; earlier checkpoints are still there then.
    """
    final = directory / f"{_PREFIX}{step:06d}"
    temporary = directory / f".{final.name}.partial"
    try:
        _write(temporary, step, models, state)
        _publish(temporary, final, keep)
    except (OSError, CheckpointException) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        free = shutil.disk_usage(directory).free / 2**30
        raise RunError(
            f"{final}: cannot be written, with {free:.1f} GiB free there; earlier checkpoints are "
            f"whole, make room and go on with --resume ({str(error).strip().splitlines()[-1]})"
        ) from error
    dist.barrier()
    return final


def _publish(temporary: Path, final: Path, keep: int) -> None:
    """Gives the checkpoint its name, on rank 0, and removes old ones and those of killed saves."""
    if dist.get_rank() != 0:
        return
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    sync(final.parent)
    for old in list(checkpoint_steps(final.parent).values())[:-keep]:
        shutil.rmtree(old)
    for unfinished in final.parent.glob(f".{_PREFIX}*.partial"):
        shutil.rmtree(unfinished)


def _write(directory: Path, step: int, models: Models, state: dict[str, Any]) -> None:
    if dist.get_rank() == 0:
        shutil.rmtree(directory, ignore_errors=True)
        for name in models:
            (directory / name).mkdir(parents=True)
    dist.barrier()
    for name, model in models.items():
        with model.parallel.active(), _in_full(model):
            tensors = _sharded(model, loading=False)
            dist_checkpointing.save(tensors, str(directory / name), async_strategy="mcore")
    dist.barrier()
    if dist.get_rank() == 0:
        schedulers = {}
        scales = {}
        for name, model in _trained(models):
            schedulers[name] = model.scheduler.state_dict()
            if model.loss_scale:
                scales[name] = model.loss_scale.state_dict()
        full = {**state, "step": step, "schedulers": schedulers, "loss_scales": scales}
        (directory / _STATE).write_text(json.dumps(full, indent=1))
        write_manifest(directory)


def load(checkpoint: Path, models: Models) -> dict[str, Any]:
    """Fills the models from a checkpoint of any layout. Collective.

    Returns the state that `save` was given.
    """
    state = read_state(checkpoint)
    for name, model in models.items():
        with model.parallel.active(), _in_full(model):
            loaded = stored.load(_sharded(model, loading=True), checkpoint / name, common=True)
            _put_weights(_chunks(model), loaded)
            if isinstance(model, Student):
                optimizer_state.load_state(model.optimizer, loaded["optimizer"])
    for name, model in _trained(models):
        # Only the schedule's position is stored: the rates are the recipe's, whose num_steps may
        # have changed.
        model.scheduler.num_steps = 0
        model.scheduler.step(state["schedulers"][name]["num_steps"])
        # A state without a scale is of a run in another precision.
        if model.loss_scale and (scale := state.get("loss_scales", {}).get(name)):
            model.loss_scale.load_state_dict(scale)
    return state


def load_weights(checkpoint: Path, chunks: list[torch.nn.Module], parallel: Parallel) -> None:
    """Fills bare model chunks of any layout with the weights of a checkpoint. Collective."""
    with parallel.active():
        wanted = _sharded_weights(chunks, parallel)
        _put_weights(chunks, stored.load(wanted, checkpoint / "model"))


def load_converted(
    model_dir: Path, chunks: list[torch.nn.Module], arch: Architecture, parallel: Parallel
) -> None:
    """Fills bare model chunks with the weights of a directory that `convert` wrote. Collective.

    Raises DataError when it is not a whole model of `arch`.
    """
    DistributedCheckpoint(model_dir / "model").check(arch)
    load_weights(model_dir, chunks, parallel)


def newest(directory: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, and a line for each newer one that is damaged.

    None when there is none yet. Raises DataError when all are damaged.
    """
    problems: list[str] = []
    for candidate in reversed(checkpoint_steps(directory).values()):
        problem = find_damage(candidate) or _problem_of_state(candidate)
        if problem is None:
            return candidate, [f"{line}; using the one before" for line in problems]
        problems.append(f"{candidate}: {problem}")
    if problems:
        raise DataError(
            f"{'; '.join(problems)}; no whole checkpoint is left: bring one back, or start again "
            "with another run_dir"
        )
    return None, []


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The state that `save` wrote. Raises DataError when it is missing or damaged."""
    if problem := _problem_of_state(checkpoint):
        raise DataError(f"{checkpoint}: {problem}; name a whole one under checkpoints/")
    return json.loads((checkpoint / _STATE).read_text())


# ---------------------------------------------------------------------------------------- internals
def _sharded_weights(chunks: list[torch.nn.Module], parallel: Parallel) -> dict[str, Any]:
    """One entry per chunk, whose tensors are named by their place in the whole model."""
    metadata = {"dp_cp_group": parallel.groups.dp_cp}
    state: dict[str, Any] = {}
    chunk: Any
    for i, chunk in enumerate(chunks):
        state[f"chunk{i}"] = chunk.sharded_state_dict(metadata=metadata)
    return state


def _put_weights(chunks: list[torch.nn.Module], loaded: dict[str, Any]) -> None:
    for i, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[f"chunk{i}"])


def _trained(models: Models) -> list[tuple[str, Student]]:
    """The models with an optimizer."""
    return [(name, model) for name, model in models.items() if isinstance(model, Student)]


def _chunks(model: Student | WeightCopy) -> list[torch.nn.Module]:
    return model.bare_chunks if isinstance(model, Student) else model.chunks


def _in_full(model: Student | WeightCopy) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if isinstance(model, Student) else model.stored()


def _sharded(model: Student | WeightCopy, *, loading: bool) -> dict[str, Any]:
    weights = _sharded_weights(_chunks(model), model.parallel)
    if not isinstance(model, Student):
        return weights
    optimizer = optimizer_state.sharded_state(model.optimizer, weights, loading=loading)
    return {**weights, "optimizer": optimizer}


def _problem_of_state(checkpoint: Path) -> str | None:
    try:
        state = json.loads((checkpoint / _STATE).read_text())
        positions = [schedule["num_steps"] for schedule in state["schedulers"].values()]
        named = checkpoint.name == f"{_PREFIX}{state['step']:06d}"
        whole = named and all(isinstance(position, int) for position in positions)
    except OSError:
        return f"{_STATE} is missing"
    except (ValueError, LookupError, TypeError, AttributeError):
        whole = False
    return None if whole else f"{_STATE} is not what a save writes"
