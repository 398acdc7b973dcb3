"""Checkpoints that are whole or absent: written under a temporary name, listed with checksums, then renamed.

    checkpoints/step-000050/
      model/         Megatron distributed checkpoint: weights and optimizer
      process/       the same of a model trained beside the student (PRIME)
      state.json     step, policy version, data position, learning-rate schedule, number of processes
      manifest.json  size and SHA-256 of every file; its presence under the final name makes the checkpoint complete

There is no generator state to keep: dropout is 0 and every draw is a function of (seed, step, prompt, sample).
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing

from megatron_opd.config.architecture import Architecture
from megatron_opd.errors import DataError
from megatron_opd.manifest import find_damage, sync, write_manifest
from megatron_opd.mcore.parallel import Parallel
from megatron_opd.train import optimizer_state
from megatron_opd.train.student import Student
from megatron_opd.weights.distributed import DistributedCheckpoint

_PREFIX = "step-"
Models = Mapping[str, Student]  # "model", the student, and what is trained beside it


def save(directory: Path, step: int, models: Models, state: dict[str, Any], *, keep: int) -> Path:
    """Writes checkpoint `step` (steps done) and removes all but the newest `keep`. Collective over the world."""
    final = directory / f"{_PREFIX}{step:06d}"
    temporary = directory / f".{final.name}.partial"
    if dist.get_rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        for name in models:
            (temporary / name).mkdir(parents=True)
    dist.barrier()
    for name, model in models.items():
        with model.parallel.active():
            dist_checkpointing.save(_sharded(model, loading=False), str(temporary / name), async_strategy="mcore")
    dist.barrier()
    if dist.get_rank() == 0:
        schedulers = {name: model.scheduler.state_dict() for name, model in models.items()}
        full = {**state, "step": step, "world_size": dist.get_world_size(), "schedulers": schedulers}
        (temporary / "state.json").write_text(json.dumps(full, indent=1))
        write_manifest(temporary)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        sync(directory)
        for old in _complete(directory)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
    return final


def load(checkpoint: Path, models: Models) -> dict[str, Any]:
    """Fills the models from a checkpoint of the same layout; returns the state given to `save`. Collective."""
    state = read_state(checkpoint)
    if state["world_size"] != dist.get_world_size():
        raise DataError(
            f"{checkpoint}: saved by {state['world_size']} processes, this is a run of {dist.get_world_size()}; "
            f"resume with --nproc {state['world_size']}"
        )
    for name, model in models.items():
        with model.parallel.active():
            loaded = dist_checkpointing.load(_sharded(model, loading=True), str(checkpoint / name))
            _only(model.bare_chunks).load_state_dict(loaded["model"])
            optimizer_state.load_state(model.optimizer, loaded["optimizer"])
        model.scheduler.load_state_dict(state["schedulers"][name])
    return state


def load_weights(checkpoint: Path, chunks: list[torch.nn.Module], parallel: Parallel) -> None:
    """Fills bare model chunks of any layout with the weights of a checkpoint. Collective."""
    with parallel.active():
        wanted = {"model": _only(chunks).sharded_state_dict(metadata={"dp_cp_group": parallel.groups.dp_cp})}
        loaded = dist_checkpointing.load(wanted, str(checkpoint / "model"))
        _only(chunks).load_state_dict(loaded["model"])


def load_converted(model_dir: Path, chunks: list[torch.nn.Module], arch: Architecture, parallel: Parallel) -> None:
    """The same from a directory that `convert` wrote. Raises DataError when it is not a whole model of `arch`."""
    DistributedCheckpoint(model_dir / "model").check(arch)
    load_weights(model_dir, chunks, parallel)


def newest(directory: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are all as written, and a line for each newer one that is damaged."""
    warnings: list[str] = []
    for candidate in reversed(_complete(directory)):
        problem = find_damage(candidate)
        if problem is None:
            return candidate, warnings
        warnings.append(f"{candidate}: {problem}; using the one before")
    return None, warnings


def read_state(checkpoint: Path) -> dict[str, Any]:
    try:
        return json.loads((checkpoint / "state.json").read_text())
    except FileNotFoundError:
        raise DataError(f"{checkpoint}: not a checkpoint (no state.json); name one under checkpoints/") from None


# ------------------------------------------------------------------------------------------------------- internals
def _only(chunks: list[torch.nn.Module]) -> Any:
    (chunk,) = chunks  # interleaved pipelines would need one entry per chunk
    return chunk


def _sharded(student: Student, *, loading: bool) -> dict[str, Any]:
    metadata = {**optimizer_state.METADATA, "dp_cp_group": student.parallel.groups.dp_cp}
    model = _only(student.bare_chunks).sharded_state_dict(metadata=metadata)
    optimizer = optimizer_state.sharded_state(student.optimizer, model, metadata, loading=loading)
    return {"model": model, "optimizer": optimizer}


def _complete(directory: Path) -> list[Path]:
    found = [p for p in directory.glob(f"{_PREFIX}*") if (p / "manifest.json").is_file()]
    return sorted(found, key=lambda p: int(p.name.removeprefix(_PREFIX)))
