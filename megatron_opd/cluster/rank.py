"""One process of a job: `python -m megatron_opd.cluster.rank RUN.job`, started by srun.

It checks its node, meets the others without a fixed port, trains (or goes on training), and leaves
the verdict that the batch script reads: finished, requeue (out of time, saved), exclude (a node is
unfit), stopped (asked to, or bad input). A process that is killed leaves none.
"""

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_opd.cluster import nodes, probe
from megatron_opd.cluster.job import Job, read
from megatron_opd.cluster.place import Place
from megatron_opd.errors import ConfigError, Interrupted, OpdError, OutOfTime, RunError
from megatron_opd.files.atomic import write_atomically
from megatron_opd.metrics.run_directory import disk_may_be_full, metrics_path
from megatron_opd.world.worker import finish, outcome, prepare_process

HEARTBEAT_SECONDS = 5.0
UNFIT = 3
VERDICTS = {
    0: "finished",
    OutOfTime.exit_code: "requeue",
    UNFIT: "exclude",
    Interrupted.exit_code: "stopped",
    ConfigError.exit_code: "stopped",  # bad input stays bad
}


def main(directory: Path) -> int:
    """Takes part in the job of RUN.job. Returns the code to exit with."""
    try:
        with disk_may_be_full(directory, "launch it again, unless Slurm starts it again itself"):
            return _work(read(directory))
    except OpdError as error:
        _say(str(error))
        return error.exit_code


def _work(job: Job) -> int:
    place = Place.from_slurm()
    os.chdir(job.working_dir)
    attempt = job.directory / "attempts" / place.attempt
    attempt.mkdir(parents=True, exist_ok=True)
    # A process that is asked to hurry while it starts has nothing to save; the run listens later.
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
        write_atomically(job.directory / "verdict", verdict.encode())
    # When one process fails, srun kills the others, which may still save or write the verdict.
    return 0 if verdict in ("finished", "requeue", "stopped") or (verdict and place.rank) else code


def _take_part(job: Job, place: Place, attempt: Path) -> int:
    seconds = 60.0 * job.cluster.start_minutes
    if place.local_rank == 0:
        nodes.report(job, attempt, place.node)
    if place.rank == 0 and (problems := nodes.unfit(attempt, place.nodes, seconds=seconds)):
        return _exclude(job, problems)
    host = nodes.address(place.node)
    other = next((node for node in place.nodes if node != place.node), None)
    if other and (name := nodes.interface(nodes.address(other))):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    if problems := probe.unreachable(place, host, attempt, seconds):
        return _exclude(job, problems) if place.rank == 0 else UNFIT
    store = _join(place, host, attempt, seconds)
    try:
        return _train(job)
    finally:
        del store


def _exclude(job: Job, problems: dict[str, str]) -> int:
    for node, problem in problems.items():
        _say(f"{node} is unfit: {problem}; it is excluded and the job submitted again")
    with (job.directory / "excluded").open("a") as file:
        file.writelines(f"{node}\n" for node in problems)
    return UNFIT


def _join(place: Place, host: str, attempt: Path, seconds: float) -> Any:
    """Sets the variables of torch's rendezvous.

    Returns the store that rank 0 serves, to be held until the end.
    """
    address, port, store = probe.meet(
        attempt / "rendezvous.json", host, seconds, first=place.rank == 0
    )
    os.environ |= {
        "RANK": str(place.rank),
        "WORLD_SIZE": str(place.world_size),
        "LOCAL_RANK": str(place.local_rank),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        # torch then joins the store that is there, as under torchrun, and serves none itself.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    return store


def _train(job: Job) -> int:
    from megatron_opd.start import train

    prepare_process()
    resume = (Path(job.run_dir) / "config.yaml").is_file()
    try:
        return finish(*outcome(lambda: train(str(job.directory / "recipe.yaml"), resume=resume)[0]))
    except RuntimeError as error:
        if not _says_that_another_is_gone(error):
            raise
        reason = str(error).splitlines()[0]
        raise RunError(
            f"another process of the job is gone, and its own log may say why ({reason})"
        ) from None


def _says_that_another_is_gone(error: RuntimeError) -> bool:
    """True for the error of a collective when another process is gone; gloo has no type for it."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or "/gloo/" in str(error)


@contextlib.contextmanager
def heartbeat(job: Job, place: Place) -> Iterator[dict[str, Any]]:
    """Writes RUN.job/heartbeat.json every few seconds; the last one holds the final state."""
    state: dict[str, Any] = {
        "state": "running",
        "step": _last_step(Path(job.run_dir)),
        "since": time.time(),
    }
    stop = threading.Event()

    def write() -> None:
        now = time.time()
        step = _last_step(Path(job.run_dir))
        if step != state["step"]:
            # a beating heart alone would hide that nothing happens
            state.update(step=step, since=now)
        content = {
            "job": place.job_id,
            "attempt": place.attempt,
            "node": place.node,
            "time": now,
        } | state
        # such as a full disk: the run itself says so where it loses anything
        with contextlib.suppress(OSError):
            write_atomically(job.directory / "heartbeat.json", json.dumps(content).encode())

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
    """The step of the last whole line of metrics.jsonl; None where there is none."""
    path = metrics_path(run_dir)
    if not path.is_file():
        return None
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 65536))
        lines = [
            line
            for line in file.read().split(b"\n")
            if line.startswith(b"{") and line.endswith(b"}")
        ]
    return json.loads(lines[-1])["step"] if lines else None


def _say(text: str) -> None:
    print(f"megatron-opd: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
