"""One process of a job: `python -m megatron_opd.cluster.rank RUN.job`, started by srun.

It checks its node, meets the others without a fixed port, trains (or goes on training), and leaves the verdict that
the batch script reads: finished, requeue (out of time, saved), exclude (a node is unfit), stopped (asked to, or bad
input). A process that is killed leaves none.
"""

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_opd.cluster import nodes
from megatron_opd.cluster.job import Job, read
from megatron_opd.config.load import load_config
from megatron_opd.config.schema import RunConfig
from megatron_opd.errors import ConfigError, Interrupted, OpdError, OutOfTime, RunError
from megatron_opd.metrics.run_directory import metrics_path, write_atomically

HEARTBEAT_SECONDS = 5.0
UNFIT = 3
VERDICTS = {
    0: "finished",
    OutOfTime.exit_code: "requeue",
    UNFIT: "exclude",
    Interrupted.exit_code: "stopped",
    ConfigError.exit_code: "stopped",  # bad input stays bad
}


@dataclass(frozen=True)
class Place:
    """Where this process stands in its job, from Slurm's variables."""

    rank: int
    world_size: int
    local_rank: int
    node: str
    nodes: list[str]  # in Slurm's order; rank 0 is on the first
    job_id: str
    attempt: str  # job and restart: two attempts never read each other's files

    @classmethod
    def from_slurm(cls) -> "Place":
        restart = os.environ.get("SLURM_RESTART_COUNT", "0")
        return cls(
            rank=int(os.environ["SLURM_PROCID"]),
            world_size=int(os.environ["SLURM_NTASKS"]),
            local_rank=int(os.environ["SLURM_LOCALID"]),
            node=nodes.node_name(),
            nodes=expand(os.environ.get("SLURM_STEP_NODELIST") or os.environ["SLURM_JOB_NODELIST"]),
            job_id=os.environ["SLURM_JOB_ID"],
            attempt=f"{os.environ['SLURM_JOB_ID']}-{restart}",
        )


def expand(nodelist: str) -> list[str]:
    """Slurm's short form of names, such as "gpu[01-03,7],login": gpu01, gpu02, gpu03, gpu7, login."""
    names, rest = [], nodelist
    while rest:
        prefix, bracket, after = rest.partition("[")
        if not bracket or "," in prefix:
            name, _, rest = rest.partition(",")
            names.append(name)
            continue
        inside, _, rest = after.partition("]")
        suffix, _, rest = rest.partition(",")
        for part in inside.split(","):
            first, _, last = part.partition("-")
            numbers = range(int(first), int(last or first) + 1)
            names += [f"{prefix}{number:0{len(first)}d}{suffix}" for number in numbers]
    return names


def main(directory: Path) -> int:
    job, place = read(directory), Place.from_slurm()
    os.chdir(job.working_dir)
    attempt = directory / "attempts" / place.attempt
    attempt.mkdir(parents=True, exist_ok=True)
    # Until the run listens to it; a process that is asked to hurry while it starts has nothing to save.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    beating: contextlib.AbstractContextManager[dict[str, Any]] = contextlib.nullcontext({})
    if place.rank == 0:
        beating = heartbeat(job, place)
    with beating as state:
        try:
            code = _take_part(job, place, attempt)
        except OpdError as error:
            _say(f"{place.node}: {error}")
            code = error.exit_code
        verdict = VERDICTS.get(code)
        state["state"] = verdict or "failed"
    if place.rank == 0 and verdict:
        (directory / "verdict").write_text(verdict)
    # Where all is well srun is told so: it kills the others, which may still be saving, when one process fails.
    return 0 if verdict in ("finished", "requeue", "stopped") else code


def _take_part(job: Job, place: Place, attempt: Path) -> int:
    seconds = 60.0 * job.cluster.start_minutes
    if place.local_rank == 0:
        nodes.report(job, attempt, place.node)
    if place.rank == 0:
        problems = nodes.unfit(attempt, place.nodes, seconds=seconds)
        for node, problem in problems.items():
            _say(f"{node} is unfit: {problem}; it is excluded and the job submitted again")
        if problems:
            with (job.directory / "excluded").open("a") as file:
                file.writelines(f"{node}\n" for node in problems)
            return UNFIT
    store = meet(place, attempt, seconds)  # held until the end: rank 0's is everybody's
    try:
        _all_reduce(load_config(str(job.directory / "recipe.yaml")), place)
        return _train(job)
    finally:
        del store


def meet(place: Place, attempt: Path, seconds: float) -> Any:
    """Sets what torch's rendezvous reads. Rank 0 serves on a port that the system chose, and writes down which."""
    from torch.distributed import TCPStore

    written, store = attempt / "rendezvous.json", None
    if place.rank == 0:
        host = nodes.address(place.node)
        store = TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False)
        write_atomically(written, json.dumps({"host": host, "port": store.port}).encode())
    until = time.monotonic() + seconds + 60  # rank 0 names the nodes that are missing first
    while not written.is_file():
        if time.monotonic() > until:
            raise RunError(f"{written}: rank 0 has not written it within {seconds + 60:.0f} s")
        time.sleep(0.1)
    found = json.loads(written.read_text())
    os.environ |= {
        "RANK": str(place.rank),
        "WORLD_SIZE": str(place.world_size),
        "LOCAL_RANK": str(place.local_rank),
        "MASTER_ADDR": found["host"],
        "MASTER_PORT": str(found["port"]),
        # torch then takes part in a store that is there, as under torchrun, in the place of serving one.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    return store


def _all_reduce(config: RunConfig, place: Place) -> None:
    """The first message between the processes of a role; whoever cannot take part says so, and ends the job."""
    import torch
    import torch.distributed as dist

    from megatron_opd.mcore import parallel as groups
    from megatron_opd.mcore.device import device

    groups.start(apart=config.processes_apart)
    ones = torch.ones(1 << 20, device=device())
    dist.all_reduce(ones)
    if not bool((ones == dist.get_world_size()).all()):
        raise RunError(f"{place.node}: an all-reduce over {dist.get_world_size()} processes gave {ones.max().item()}")


def _train(job: Job) -> int:
    from megatron_opd.cli import main as command

    resume = ["--resume"] if (Path(job.run_dir) / "config.yaml").is_file() else []
    return command(["train", str(job.directory / "recipe.yaml"), *resume])


@contextlib.contextmanager
def heartbeat(job: Job, place: Place) -> Iterator[dict[str, Any]]:
    """Writes RUN.job/heartbeat.json every few seconds; the last one holds the final state."""
    state: dict[str, Any] = {"state": "running"}
    stop = threading.Event()

    def write() -> None:
        known = {"job": place.job_id, "attempt": place.attempt, "node": place.node, "time": time.time()}
        said = known | {"step": _last_step(Path(job.run_dir))} | state
        write_atomically(job.directory / "heartbeat.json", json.dumps(said).encode())

    def beat() -> None:
        while not stop.wait(HEARTBEAT_SECONDS):
            write()

    write()
    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield state
    except BaseException:
        state["state"] = "failed"
        raise
    finally:
        stop.set()
        thread.join()
        write()


def _last_step(run_dir: Path) -> int | None:
    """Of the last whole line of metrics.jsonl."""
    path = metrics_path(run_dir)
    if not path.is_file():
        return None
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 65536))
        lines = [line for line in file.read().split(b"\n") if line.startswith(b"{") and line.endswith(b"}")]
    return json.loads(lines[-1])["step"] if lines else None


def _say(text: str) -> None:
    print(f"megatron-opd: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
