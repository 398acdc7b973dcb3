"""A verifier's worker process, seen from the training process."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from megatron_opd.errors import RunError
from megatron_opd.verify.worker import wall_seconds

WORKER_MEMORY_BYTES = 2 * 1024**3
START_SECONDS = 120  # importing math-verify takes 1 to 4 s on an idle machine
GRACE_SECONDS = 10  # beyond the worker's own time limit, after which it counts as hung
PACKAGE_ROOT = Path(__file__).resolve().parents[2]


class WorkerDied(Exception):
    """The worker closed its pipe or stayed silent."""


class WorkerProcess:
    """A `megatron_opd.verify.worker` process, started at the first need and again when it dies."""

    def __init__(self, *judge: str) -> None:
        self.judge = judge  # the arguments of verify/worker.py that name it
        self.process: subprocess.Popen[bytes] | None = None
        self.ready = False
        self.closed = False

    def start(self) -> None:
        if self.process is not None or self.closed:
            return
        search_path = [str(PACKAGE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        # A fixed hash seed fixes the order in which sympy walks its sets, so that the same answer
        # gets the same verdict.
        environment = dict(os.environ)
        environment["PYTHONPATH"] = os.pathsep.join(search_path)
        environment["PYTHONHASHSEED"] = "0"
        module = ["-P", "-m", "megatron_opd.verify.worker", str(WORKER_MEMORY_BYTES), *self.judge]
        self.ready = False
        self.log = tempfile.TemporaryFile()  # noqa: SIM115  (closed by end)
        self.process = subprocess.Popen(
            [sys.executable, *module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env=environment,
            # Ctrl-C reaches the training process alone, and its close() ends the group.
            start_new_session=True,
        )

    def grade(self, answer: str, gold: str, limit_seconds: float) -> str:
        """The reason of the verdict, "timeout" at the limit.

        A worker that dies is replaced and asked once more.
        """
        for _ in range(2):
            try:
                self._wait_until_ready()
                return self._ask(answer, gold, limit_seconds)
            except WorkerDied:
                self.end()
        if self.closed:
            raise RunError("the reward workers were closed while they graded")
        return "crashed"

    def interrupt(self) -> None:
        """Makes a `grade` that waits in another thread return, and refuses new ones."""
        self.closed = True
        self._signal_kill()

    def _ask(self, answer: str, gold: str, limit_seconds: float) -> str:
        process = self.process
        if process is None or process.stdin is None:
            raise WorkerDied
        try:
            process.stdin.write(json.dumps([answer, gold, limit_seconds]).encode() + b"\n")
            process.stdin.flush()
        except OSError as error:
            raise WorkerDied from error
        # The worker evaluates a request twice if its first evaluator was killed from outside.
        return self._read_line(2 * wall_seconds(limit_seconds) + GRACE_SECONDS)

    def _wait_until_ready(self) -> None:
        self.start()
        if self.ready or self.closed:
            return
        try:
            self.ready = self._read_line(START_SECONDS) == "ready"
        except WorkerDied as error:
            if self.closed:
                raise
            self.log.seek(0)
            lines = self.log.read().decode(errors="replace").strip().splitlines()
            self.end()
            raise RunError(
                f"a reward worker did not start: {lines[-1] if lines else 'no output'}"
            ) from error

    def _read_line(self, seconds: float) -> str:
        process = self.process
        if process is None or process.stdout is None:
            raise WorkerDied
        poll = select.poll()
        poll.register(process.stdout, select.POLLIN)
        deadline = time.monotonic() + seconds
        line = b""
        while not line.endswith(b"\n"):
            remaining = deadline - time.monotonic()
            if remaining <= 0 or not poll.poll(remaining * 1000):
                raise WorkerDied
            received = os.read(process.stdout.fileno(), 4096)
            if not received:
                raise WorkerDied
            line += received
        return line.decode().strip()

    def end(self) -> None:
        """Kills the process and its evaluator, and collects them."""
        self._signal_kill()
        process = self.process
        self.process = None
        if process is None:
            return
        process.wait()
        for file in (process.stdin, process.stdout, self.log):
            if file is not None:
                with contextlib.suppress(OSError):
                    file.close()

    def _signal_kill(self) -> None:
        process = self.process  # another thread may clear it
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
