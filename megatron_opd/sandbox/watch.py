"""One program, started and watched by the server until it ends or is ended."""

import contextlib
import os
import resource
import select
import signal
import time
from dataclasses import dataclass, replace

from megatron_opd.sandbox import folder
from megatron_opd.sandbox.child import become
from megatron_opd.sandbox.limits import ERROR_BYTES, MOST_THREADS, Finished, Limits, Reason

# How often a program's processor time is read, and how often a folder that it can write to is
# looked at: between two looks it makes some hundred files.
TIME_SECONDS = 0.05
FOLDER_SECONDS = 0.01
CHUNK_BYTES = 2**16
_PROCESS_CLOCK = 2  # of clock_getcpuclockid(3), with the number of a process

# Fails where the filter of system calls does not work.
_TRIAL = b"""
import os
try:
    os.fork()
except PermissionError:
    print("refused")
"""


class CallerGone(Exception):
    """Nobody waits for the outcome any more."""


@dataclass(frozen=True)
class Settings:
    """What is the same for every program of a server."""

    python: str
    scratch: str  # a folder that exists, for this server alone
    readable: list[str]
    packages: list[str]  # folders of what may be imported beside the library
    landlock: bool

    @property
    def program(self) -> str:
        return os.path.join(self.scratch, "program.py")

    @property
    def work(self) -> str:
        """The folder where a program begins, the only one where it may write."""
        return os.path.join(self.scratch, "work")

    @property
    def links(self) -> str:
        """The folder where the packages are found, and none of those that lie beside them."""
        return os.path.join(self.scratch, "packages")


def trial(settings: Settings, caller: int) -> str:
    """Why programs cannot be run here; "" where they can."""
    finished = watched(_TRIAL, b"", Limits(), settings, caller)
    if finished.stdout == b"refused\n":
        return ""
    lines = finished.stderr.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"a trial ended with {finished.reason}, {finished.exit_code}"


def watched(
    source: bytes, stdin: bytes, limits: Limits, settings: Settings, caller: int
) -> Finished:
    """Runs a program to its end, within its limits.

    `caller` is a pipe; raises CallerGone when its other end is closed.
    """
    os.mkdir(settings.work, mode=0o700)
    os.mkdir(settings.links, mode=0o700)
    for path in settings.packages:
        os.symlink(path, os.path.join(settings.links, os.path.basename(path)))
    with open(settings.program, "wb") as file:
        file.write(source)
    # a program of root's has no right left to go round a mode
    os.chmod(settings.program, 0o400)
    closed = [settings.links, settings.scratch, *([] if limits.files else [settings.work])]
    for path in closed:
        os.chmod(path, 0o500)
    started = time.monotonic()
    watch = _Watch(stdin, limits, settings, caller)
    try:
        reason = watch.wait(started + limits.wall_seconds)
    finally:
        status, usage = watch.end()
        os.chmod(settings.scratch, 0o700)
        folder.empty(settings.scratch)
    finished = Finished(
        reason="ok",
        exit_code=os.waitstatus_to_exitcode(status),
        stdout=bytes(watch.received["stdout"][: limits.output_bytes]),
        stderr=bytes(watch.received["stderr"][-ERROR_BYTES:]) or bytes(watch.received["trouble"]),
        handed_back=bytes(watch.received["handed_back"][: limits.output_bytes]),
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        wall_seconds=time.monotonic() - started,
    )
    if watch.received["trouble"]:  # the program has not begun
        return replace(finished, reason="lost")
    return replace(finished, reason=reason or _reason(finished))


def _reason(finished: Finished) -> Reason:
    """Why a program that nobody ended has ended."""
    if finished.exit_code == 0:
        return "ok"
    if finished.exit_code < 0:
        return "crashed"
    last = finished.stderr.strip().rpartition(b"\n")[2]
    return "memory" if last.startswith(b"MemoryError") else "failed"


class _Watch:
    """A program's process and its pipes."""

    def __init__(self, stdin: bytes, limits: Limits, settings: Settings, caller: int) -> None:
        self.limits = limits
        self.settings = settings
        self.caller = caller
        self.stdin = memoryview(stdin)
        self.received = {
            name: bytearray() for name in ("stdout", "stderr", "handed_back", "trouble")
        }
        self.counted = bool(limits.files) or not settings.landlock
        to_program, self.stdin_end = os.pipe()
        os.set_blocking(self.stdin_end, False)
        pipes = {name: os.pipe() for name in self.received}
        *writing, trouble = (written for _, written in pipes.values())
        self.reading = {read: name for name, (read, _) in pipes.items()}
        self.pid = os.fork()
        if self.pid == 0:
            become(
                limits,
                python=settings.python,
                program=settings.program,
                folder=settings.work,
                pipes=[to_program, *writing],
                trouble=trouble,
                readable=[*settings.readable, settings.links],
                packages=settings.links if settings.packages else "",
                files_guarded=settings.landlock,
            )
        for descriptor in (to_program, *writing, trouble):
            os.close(descriptor)
        self.poll = select.poll()
        self.poll.register(self.stdin_end, select.POLLOUT)
        self.poll.register(caller, 0)
        for descriptor in self.reading:
            self.poll.register(descriptor, select.POLLIN)

    def wait(self, deadline: float) -> Reason | None:
        """Until it has ended, or has to be: then the reason."""
        while self.reading or not self._ended():
            left = deadline - time.monotonic()
            if left <= 0:
                return "timeout"
            # after the last pipe the process itself ends, at once unless it closed them
            pause = FOLDER_SECONDS if self.counted else TIME_SECONDS
            self._serve(min(pause, left) if self.reading else 0.001)
            if self._cpu_seconds() > self.limits.cpu_seconds:
                return "timeout"
            if self._too_much():
                return "output"
            if self.counted and folder.more_than(self.settings.work, self.limits.files):
                return "files"
            if self._threads() > MOST_THREADS:
                return "threads"
        return None

    def end(self) -> tuple[int, resource.struct_rusage]:
        """Kills what is left, and collects it."""
        # not collected yet, so that its number is still its own
        for kill in (os.killpg, os.kill):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                kill(self.pid, signal.SIGKILL)
        _, status, usage = os.wait4(self.pid, 0)
        for descriptor in (*self.reading, self.stdin_end):
            with contextlib.suppress(OSError):
                os.close(descriptor)
        return status, usage

    def _serve(self, seconds: float) -> None:
        """What is ready within some seconds: read, written, noticed."""
        for descriptor, events in self.poll.poll(seconds * 1000):
            if descriptor == self.caller:
                raise CallerGone
            if descriptor in self.reading:
                self._read(descriptor)
            elif events & select.POLLERR or not self._written():
                self.poll.unregister(descriptor)
                os.close(descriptor)
                self.stdin_end = -1

    def _read(self, descriptor: int) -> None:
        part = os.read(descriptor, CHUNK_BYTES)
        name = self.reading[descriptor]
        self.received[name] += part
        if name == "stderr":
            del self.received[name][: -2 * ERROR_BYTES]
        if not part:
            self.poll.unregister(descriptor)
            del self.reading[descriptor]
            os.close(descriptor)

    def _written(self) -> bool:
        """Writes of stdin what the pipe takes; False when nothing is left."""
        try:
            self.stdin = self.stdin[os.write(self.stdin_end, self.stdin[:CHUNK_BYTES]) :]
        except BlockingIOError:
            return True
        except OSError:
            return False
        return len(self.stdin) > 0

    def _too_much(self) -> bool:
        names = ("stdout", "handed_back")
        return any(len(self.received[name]) > self.limits.output_bytes for name in names)

    def _cpu_seconds(self) -> float:
        """Exact, where the kernel's own limit counts ticks, between which a program can hide."""
        with contextlib.suppress(OSError):  # it has ended
            return time.clock_gettime(~self.pid << 3 | _PROCESS_CLOCK)
        return 0.0

    def _threads(self) -> int:
        with contextlib.suppress(OSError):  # it has ended, or there is no /proc
            return os.stat(f"/proc/{self.pid}/task").st_nlink - 2
        return 0

    def _ended(self) -> bool:
        options = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self.pid, options) is not None
