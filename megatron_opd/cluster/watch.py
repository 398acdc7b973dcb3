"""`megatron-opd status`, `logs` and `cancel` of a launched run, by its directory."""

import sys
import time
from pathlib import Path
from typing import Any

from megatron_opd.cluster import slurm
from megatron_opd.cluster.job import directory_of, job_ids, last_heartbeat, read
from megatron_opd.errors import ConfigError, RunError
from megatron_opd.metrics.run_directory import disk_may_be_full

CANCEL_SECONDS = 180


def status(run_dir: Path) -> int:
    """Prints the newest job's state, the last heartbeat, and what to do next. Returns 0."""
    directory = directory_of(run_dir)
    job = read(directory)
    ids = job_ids(directory)
    if not ids:
        raise ConfigError(f"{directory}: nothing was submitted; run megatron-opd launch again")
    state = slurm.state(ids[-1])
    beat = last_heartbeat(directory)
    earlier = f", after {', '.join(ids[:-1])}" if len(ids) > 1 else ""
    print(f"job {ids[-1]}: {state}{earlier}")
    if beat:
        print(in_words(beat, time.time()))
    excluded = (directory / "excluded").read_text().split()
    if excluded:
        print(f"excluded nodes: {', '.join(excluded)}")
    if state.startswith(("FAILED", "TIMEOUT", "PREEMPTED", "NODE_FAIL", "OUT_OF_MEMORY")):
        print(f"go on with: megatron-opd launch {job.directory / 'recipe.yaml'} --cluster ...")
    return 0


def logs(run_dir: Path, *, follow: bool) -> int:
    """Prints the newest job's logs: the batch script's, then those of its processes.

    With `follow` it goes on until the job has ended.
    """
    directory = directory_of(run_dir)
    read(directory)
    shown: dict[Path, int] = {}
    while True:
        ids = job_ids(directory)
        going_on = follow and bool(ids) and slurm.in_queue(ids[-1])
        for path in _logs_of(directory / "logs", ids[-1]) if ids else []:
            _print_new(path, shown)
        if not going_on:
            break
        time.sleep(1)
    if not shown:
        print(f"megatron-opd: {directory / 'logs'} is empty as yet", file=sys.stderr)
    return 0


def cancel(run_dir: Path) -> int:
    """Ends a run's jobs, at once, and waits until none of their processes is left."""
    directory = directory_of(run_dir)
    read(directory)
    with disk_may_be_full(directory, "cancel it again"):
        (directory / "cancelled").touch()  # first: a job that ends must not be started again
    running = [job_id for job_id in job_ids(directory) if slurm.in_queue(job_id)]
    for job_id in running:
        slurm.ask("scancel", job_id)
    until = time.monotonic() + CANCEL_SECONDS
    while any(slurm.in_queue(job_id) for job_id in running):
        if time.monotonic() > until:
            raise RunError(
                f"job {running[-1]} still ends after {CANCEL_SECONDS} s; look at: squeue -j "
                f"{running[-1]}"
            )
        time.sleep(0.5)
    if running:
        print(f"cancelled job {', '.join(running)}")
    else:
        print("no job of this run is in the queue")
    return 0


def in_words(beat: dict[str, Any], now: float) -> str:
    step = "before its first step" if beat["step"] is None else f"at step {beat['step']}"
    if beat["state"] == "running":
        step += f" for {beat['time'] - beat['since']:.0f} s"
    ago = now - beat["time"]
    where = f"on {beat['node']} (attempt {beat['attempt']})"
    return f"last heartbeat: {beat['state']} {step}, {ago:.0f} s ago {where}"


def _logs_of(directory: Path, job_id: str) -> list[Path]:
    """The batch script's log, then those of the processes, restart by restart."""
    return [*directory.glob(f"batch_{job_id}.out"), *sorted(directory.glob(f"{job_id}_*.out"))]


def _print_new(path: Path, shown: dict[Path, int]) -> None:
    with path.open(errors="replace") as file:
        file.seek(shown.get(path, 0))
        text = file.read()
        shown[path] = file.tell()
    if text:
        print(f"== {path.name}\n{text}", end="" if text.endswith("\n") else "\n", flush=True)
