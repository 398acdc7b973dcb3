"""A reward worker: `python -m megatron_opd.reward.worker TIMEOUT_SECONDS MEMORY_BYTES`.

Reads a JSON list [answer, gold] per line on stdin and writes one reason per line on stdout. This process only imports
math-verify and forks; a child evaluates, under an interval timer and a memory limit. At the limit the kernel ends the
child even in the middle of a C loop, and the next fork costs milliseconds where a new process pays seconds of imports.
"""

import json
import os
import resource
import signal
import socket
import sys
from contextlib import suppress
from typing import Any


class Evaluator:
    """A forked child that answers requests until an answer kills it."""

    def __init__(self, timeout_seconds: float, memory_bytes: int) -> None:
        ours, theirs = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                ours.close()
                evaluate_requests(theirs.makefile("rwb"), timeout_seconds, memory_bytes)
            finally:
                os._exit(1)  # never back into the parent's loop
        theirs.close()
        self.stream = ours.makefile("rwb")
        ours.close()

    def ask(self, request: bytes) -> bytes:
        """Return a reply line, or nothing when the child died."""
        try:
            self.stream.write(request)
            self.stream.flush()
            return self.stream.readline()
        except OSError:
            return b""

    def bury(self) -> int:
        """Collect the dead child; return the signal that ended it (0: none)."""
        _, status = os.waitpid(self.pid, 0)
        with suppress(OSError):
            self.stream.close()
        return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def evaluate_requests(stream: Any, timeout_seconds: float, memory_bytes: int) -> None:
    """The child's loop."""
    from megatron_opd.reward.math import judge

    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1):  # nothing the libraries print may reach the protocol
        os.dup2(null, descriptor)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    for request in stream:
        signal.setitimer(signal.ITIMER_REAL, timeout_seconds)
        reason = judge(*json.loads(request))
        signal.setitimer(signal.ITIMER_REAL, 0)
        stream.write(reason.encode() + b"\n")
        stream.flush()


def main() -> None:
    timeout_seconds, memory_bytes = float(sys.argv[1]), int(sys.argv[2])
    for each in (signal.SIGUSR1, signal.SIGTERM):  # Slurm sends them to all; the trainer first finishes its step
        signal.signal(each, signal.SIG_IGN)
    from megatron_opd.reward.math import judge

    judge(r"\boxed{\sqrt{4}}", "2")  # fills the parser's and sympy's caches, which every evaluator then inherits
    replies = sys.stdout.buffer
    replies.write(b"ready\n")
    replies.flush()
    evaluator: Evaluator | None = None
    for request in sys.stdin.buffer:
        reply = b"crashed\n"
        for _ in range(2):  # a child that something else killed gets the request a second time
            evaluator = evaluator or Evaluator(timeout_seconds, memory_bytes)
            if answered := evaluator.ask(request):
                reply = answered
                break
            ended_by, evaluator = evaluator.bury(), None
            if ended_by == signal.SIGALRM:
                reply = b"timeout\n"
                break
        replies.write(reply)
        replies.flush()


if __name__ == "__main__":
    main()
