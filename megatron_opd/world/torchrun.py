"""Starts the training processes of one machine under torchrun, and reports how they ended.

There are three layers: this process, of the user's command; torchrun's agent (`python -m
megatron_opd.world.torchrun`), in a session of its own, so that a terminal's Ctrl-C reaches only
this process; and the workers. Ctrl-C and SIGTERM are passed to the workers themselves: torchrun
would kill them after 30 s, and a step may take longer. torchrun also hides exit codes, so every
worker leaves its own in a file.
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

OUTCOMES = "MEGATRON_OPD_OUTCOMES"  # the directory of the workers' exit codes and messages
PREFLIGHT_DONE = "MEGATRON_OPD_PREFLIGHT_DONE"  # set when recipe and data have been checked
INTERRUPTED = 130
_PR_SET_PDEATHSIG = 1


def run_workers(nproc: int, argv: Sequence[str]) -> tuple[int, str]:
    """Runs `torchrun ARGV` (a script or `-m module`, with arguments) in `nproc` processes.

    The first SIGINT or SIGTERM is passed on to the workers, which finish the step and save; the
    second kills them. Returns, at the end, the exit code and its message: of the rank that failed
    first, or 130 when interrupted.
    """
    with tempfile.TemporaryDirectory(prefix="megatron-opd-") as outcomes:
        environment = dict(os.environ) | {OUTCOMES: outcomes, PREFLIGHT_DONE: "1"}
        threads = max(1, len(os.sched_getaffinity(0)) // nproc)
        environment.setdefault("OMP_NUM_THREADS", str(threads))
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
            if signals.received:
                return INTERRUPTED, "interrupted"
            return 1, "the training processes died"
        return code, message


def record_outcome(code: int, message: str) -> int:
    """Leaves a worker's outcome for `run_workers`. Returns the code to exit with.

    It is 0 for an interrupted worker, or torchrun would kill workers that are still saving.
    """
    rank = os.environ.get("RANK", "0")
    Path(os.environ[OUTCOMES], rank).write_text(json.dumps({"code": code, "message": message}))
    return 0 if code == INTERRUPTED else code


def is_worker() -> bool:
    """True when `run_workers` started this process."""
    return OUTCOMES in os.environ and "RANK" in os.environ


def die_with_parent(signum: int) -> None:
    """Asks the kernel to send `signum` to this process when its parent ends."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signum)


class _Forwarder:
    """Passes the first signal to the workers, and kills them at the second."""

    def __init__(self, agent_pid: int) -> None:
        self.agent_pid = agent_pid
        self.received = 0

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Handles SIGINT and SIGTERM within the block."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self._handle) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def kill(self) -> None:
        """Kills workers and agent."""
        for pid in [*_children(self.agent_pid), self.agent_pid]:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)  # torchrun makes every worker the leader of a group

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        self.received += 1
        workers = _children(self.agent_pid)
        if self.received > 1 or not workers:
            self.kill()
            return
        line = "megatron-opd: stopping after this step; once more kills"
        print(line, file=sys.stderr, flush=True)
        for pid in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signum)


def _children(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    return [int(child) for child in children.split()]


def _read_outcome(outcomes: Path) -> tuple[int, str]:
    """The failure of the lowest rank; an interruption only if no rank failed.

    When a rank fails, torchrun stops the others.
    """
    paths = sorted(outcomes.iterdir(), key=lambda path: int(path.name))
    ended = [json.loads(path.read_text()) for path in paths]
    if not ended:
        return 0, ""
    worst = min(ended, key=lambda outcome: (outcome["code"] == 0, outcome["code"] == INTERRUPTED))
    return worst["code"], worst["message"]


def _agent(nproc: int, argv: Sequence[str]) -> int:
    """Runs torchrun; writes the outcome of a worker that died without leaving one."""
    parent = os.getppid()
    die_with_parent(signal.SIGTERM)
    if os.getppid() != parent:
        return 1
    import logging

    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # The outcome has the failure in one line.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    rendezvous = [
        "--nnodes=1",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=127.0.0.1:0",
        "--local-addr=127.0.0.1",
    ]
    # Behind "--" torchrun reads no option: it would take `--nproc` of ours for one of its own.
    program = ["--module", "--", *argv[1:]] if argv[0] == "-m" else ["--", *argv]
    try:
        torchrun.main([*rendezvous, f"--nproc-per-node={nproc}", *program])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        path = Path(os.environ[OUTCOMES], str(rank))
        if not path.exists():
            end = "failed; see above"
            if failure.exitcode < 0:
                end = f"was killed by {signal.Signals(-failure.exitcode).name}"
            path.write_text(json.dumps({"code": 1, "message": f"the process of rank {rank} {end}"}))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_agent(int(sys.argv[1]), sys.argv[2:]))
