"""A sandbox: programs that a model wrote, one at a time, each in a process of its own."""

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict

from megatron_opd.errors import RunError
from megatron_opd.sandbox import wire
from megatron_opd.sandbox.bubblewrap import PACKAGE as PACKAGE_IN_BUBBLEWRAP
from megatron_opd.sandbox.bubblewrap import SCRATCH
from megatron_opd.sandbox.interpreter import ENVIRONMENT, OPTIONS, base_python, readable_paths
from megatron_opd.sandbox.layers import PACKAGE, Layers
from megatron_opd.sandbox.limits import Finished, Limits

START_SECONDS = 60.0
GRACE_SECONDS = 10.0  # beyond a program's wall time, after which its server counts as hung
CLOSE_SECONDS = 2.0


class Sandbox:
    """Runs programs with the given layers; called by one thread at a time.

    Its server starts at the first program, and again when it is lost. A program that hangs,
    exhausts its limits or crashes is ended, and leaves nothing behind: no process, no file.
    """

    def __init__(self, layers: Layers, *, allow_weak: bool = False) -> None:
        """Raises RunError where no program is run with these layers."""
        if refusal := layers.refusal(allow_weak=allow_weak):
            raise RunError(refusal)
        self.layers = layers
        self._python = base_python()
        self._server: subprocess.Popen[bytes] | None = None
        self._scratch = ""
        self._closed = False

    def run(self, source: str, stdin: bytes = b"", limits: Limits | None = None) -> Finished:
        """The outcome of a Python program. Raises RunError when the server does not start."""
        limits = limits or Limits()
        code = source.encode(errors="replace")
        for _ in range(2):
            self._start()
            try:
                return self._ask(code, stdin, limits)
            except wire.Ended:
                self._end()
        return Finished("lost", 1, b"", b"", b"", 0.0, 0.0)

    def interrupt(self) -> None:
        """Makes a `run` that waits in another thread end with RunError, and refuses new ones."""
        self._closed = True
        self._kill()

    def close(self) -> None:
        """Ends the server and its program, and removes its folder. Idempotent."""
        self._closed = True
        self._end()

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, source: bytes, stdin: bytes, limits: Limits) -> Finished:
        server = self._server
        if server is None or server.stdin is None or server.stdout is None:
            raise wire.Ended("closed")
        wire.send(server.stdin.fileno(), {"limits": asdict(limits)}, source, stdin)
        replies = server.stdout.fileno()
        waiting = _until(replies, limits.wall_seconds + GRACE_SECONDS)
        header, (stdout, stderr, handed_back) = wire.receive(replies, waiting)
        return Finished(
            reason=header["reason"],
            exit_code=header["exit_code"],
            stdout=stdout,
            stderr=stderr,
            handed_back=handed_back,
            cpu_seconds=header["cpu_seconds"],
            wall_seconds=header["wall_seconds"],
        )

    def _start(self) -> None:
        if self._closed:
            raise RunError("the sandbox is closed")
        if self._server is not None:
            return
        if not self.layers.command:  # bubblewrap makes one, which no other process sees
            self._scratch = tempfile.mkdtemp(prefix="megatron-opd-sandbox-")
        self._server = self._started()
        assert self._server.stdout is not None
        replies = self._server.stdout.fileno()
        try:
            header, _ = wire.receive(replies, _until(replies, START_SECONDS))
            trouble = header["ready"]
        except wire.Ended as error:
            trouble = f"its server ended: {error}"
        if trouble:
            self._end()
            raise RunError(f"the sandbox does not start: {trouble}")

    def _started(self) -> subprocess.Popen[bytes]:
        inside = bool(self.layers.command)
        root = PACKAGE_IN_BUBBLEWRAP if inside else str(PACKAGE.parent)
        server = os.path.join(root, PACKAGE.name, "sandbox", "server.py")
        settings = {
            "python": self._python,
            "scratch": SCRATCH if inside else self._scratch,
            "readable": [*readable_paths(self._python), *self.layers.packages],
            "packages": list(self.layers.packages),
            "landlock": not self.layers.landlock,
        }
        command = [self._python, *OPTIONS, server, root, json.dumps(settings)]
        try:
            return subprocess.Popen(
                [*self.layers.command, *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=ENVIRONMENT,
                cwd="/",
                # Ctrl-C reaches the training process alone, and its close() ends the server.
                start_new_session=True,
            )
        except OSError as error:
            raise RunError(f"the sandbox does not start: {error}") from None

    def _kill(self) -> None:
        server = self._server  # another thread may clear it
        if server is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)

    def _end(self) -> None:
        server = self._server
        if server is not None:
            assert server.stdin is not None and server.stdout is not None
            with contextlib.suppress(OSError):
                server.stdin.close()  # it ends its program, and then itself
            try:
                server.wait(CLOSE_SECONDS)
            except subprocess.TimeoutExpired:
                self._kill()
                server.wait()
            server.stdout.close()
            self._server = None
        if self._scratch:
            with contextlib.suppress(OSError):
                os.chmod(self._scratch, 0o700)  # a killed server has left it as a program sees it
            shutil.rmtree(self._scratch, ignore_errors=True)
            self._scratch = ""


def _until(descriptor: int, seconds: float) -> Callable[[], None]:
    """Waits for something to read, and raises wire.Ended when the time is over."""
    deadline = time.monotonic() + seconds
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)

    def wait() -> None:
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            raise wire.Ended("it does not answer")

    return wait
