"""What a program may use, and what became of it."""

from dataclasses import dataclass
from typing import Literal

MIB = 2**20

Reason = Literal[
    "ok", "failed", "crashed", "timeout", "memory", "output", "files", "threads", "lost"
]


@dataclass(frozen=True)
class Limits:
    """What one program may use."""

    cpu_seconds: float = 6.0  # processor time of all its threads
    wall_seconds: float = 24.0
    memory_bytes: int = 1024 * MIB  # of address space
    stack_bytes: int = 64 * MIB
    output_bytes: int = MIB  # of stdout, and of what it hands back
    file_bytes: int = 8 * MIB  # of a file that it writes
    files: int = 0  # in its folder, which it may write to; 0: it may write no file at all
    open_files: int = 32


@dataclass(frozen=True)
class Finished:
    """A program that has ended.

    ok: exit code 0. failed: another one. crashed: by a signal. timeout: at a limit of time. memory:
    failed, and the last that it wrote to stderr is a MemoryError. output, files, threads: more than
    allowed. lost: the sandbox's fault; what watched it was ended from outside, twice, or it did not
    begin.
    """

    reason: Reason
    exit_code: int  # minus the signal's number where a signal ended it
    stdout: bytes
    stderr: bytes  # its end, ERROR_BYTES at most
    handed_back: bytes  # what it wrote to the descriptor HANDED_BACK
    cpu_seconds: float
    wall_seconds: float


ERROR_BYTES = 4096
MOST_THREADS = 128  # of a program
HANDED_BACK = 3  # a descriptor beside stdout, for what a program's prints must not reach
