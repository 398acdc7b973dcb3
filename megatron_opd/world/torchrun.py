"""Starts the training processes of one machine under torchrun, and reports how they ended.

Three layers: this process (the command the user typed), torchrun's agent (`python -m
megatron_opd.world.torchrun`, a session of its own, so a terminal's Ctrl-C reaches only us), and the
workers. Ctrl-C and SIGTERM are passed to the workers themselves: torchrun would kill them after 30
s, and a step may take longer. torchrun also hides exit codes, so every worker leaves its own in a
file.
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

OUTCOMES = "MEGATRON_OPD_OUTCOMES"  # directory where each worker leaves its exit code and message
# the starting process has checked the recipe and the data
PREFLIGHT_DONE = "MEGATRON_OPD_PREFLIGHT_DONE"
INTERRUPTED = 130
_PR_SET_PDEATHSIG = 1


def run_workers(nproc: int, argv: Sequence[str]) -> tuple[int, str]:
    """Runs `torchrun ARGV` (a script or `-m module`, and its arguments) in `nproc` processes, and
    waits.

    The first SIGINT or SIGTERM is passed on to the workers, which finish the step and save; the
    second kills them. Returns the exit code (that of the rank that failed first, 130 when
    interrupted) and its message.
    """
    with tempfile.TemporaryDirectory(prefix="megatron-opd-") as outcomes:
        environment = dict(os.environ) | {OUTCOMES: outcomes, PREFLIGHT_DONE: "1"}
        environment.setdefault(
            "OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // nproc))
        )
        command = [sys.executable, "-m", "megatron_opd.world.torchrun", str(nproc), *argv]
        agent = subprocess.Popen(command, env=environment, start_new_session=True)
        signals = _Forwarder(agent.pid)
        with signals.installed():
            try:
                status = agent.wait()
            finally:
                if agent.poll() is None:
                    signals.kill()
                    agent.wait()
        code, message = _read_outcome(Path(outcomes))
        if code == 0 and status != 0:
            return (
                (INTERRUPTED, "interrupted")
                if signals.received
                else (1, "the training processes died")
            )
        return code, message


def record_outcome(code: int, message: str) -> int:
    """In a worker: leaves its outcome for `run_workers`. Returns the code to exit with.

    An interrupted worker exits with 0, else torchrun would kill those that are still saving.
    """
    rank = os.environ.get("RANK", "0")
    Path(os.environ[OUTCOMES], rank).write_text(json.dumps({"code": code, "message": message}))
    return 0 if code == INTERRUPTED else code


def is_worker() -> bool:
    """Whether `run_workers` started this process."""
    return OUTCOMES in os.environ and "RANK" in os.environ


def die_with_parent(signum: int) -> None:
    """Asks the kernel to send `signum` to this process when its parent ends, so that nothing is
    left behind."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signum)


class _Forwarder:
    """Passes the first signal to the workers, kills everything at the second."""

    def __init__(self, agent_pid: int) -> None:
        self.agent_pid = agent_pid
        self.received = 0

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        before = {
            each: signal.signal(each, self._handle) for each in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)

    def kill(self) -> None:
        for pid in [*_children(self.agent_pid), self.agent_pid]:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)  # torchrun makes every worker the leader of a group

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        self.received += 1
        workers = _children(self.agent_pid)
        if self.received > 1 or not workers:
            self.kill()
            return
        print(
            "megatron-opd: stopping after this step; once more kills", file=sys.stderr, flush=True
        )
        for pid in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signum)


def _children(pid: int) -> list[int]:
    try:
        return [
            int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        ]
    except OSError:
        return []


def _read_outcome(outcomes: Path) -> tuple[int, str]:
    """The failure of the lowest rank. A stop counts only when no rank failed: torchrun stops the
    others then."""
    ended = [
        json.loads(path.read_text())
        for path in sorted(outcomes.iterdir(), key=lambda path: int(path.name))
    ]
    by_severity = sorted(ended, key=lambda each: (each["code"] == 0, each["code"] == INTERRUPTED))
    return (by_severity[0]["code"], by_severity[0]["message"]) if by_severity else (0, "")


def _agent(nproc: int, argv: Sequence[str]) -> int:
    """torchrun itself; a worker that died without leaving its outcome gets one here."""
    parent = os.getppid()
    die_with_parent(signal.SIGTERM)
    if os.getppid() != parent:
        return 1
    import logging

    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # the outcome says it in one line
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    rendezvous = [
        "--nnodes=1",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=127.0.0.1:0",
        "--local-addr=127.0.0.1",
    ]
    try:
        torchrun.main([*rendezvous, f"--nproc-per-node={nproc}", *argv])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        path = Path(os.environ[OUTCOMES], str(rank))
        if not path.exists():
            how = (
                f"was killed by {signal.Signals(-failure.exitcode).name}"
                if failure.exitcode < 0
                else "failed; see above"
            )
            path.write_text(json.dumps({"code": 1, "message": f"the process of rank {rank} {how}"}))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_agent(int(sys.argv[1]), sys.argv[2:]))
