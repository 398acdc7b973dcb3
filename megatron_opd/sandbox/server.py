"""The server of a sandbox: `python server.py PACKAGE_ROOT SETTINGS`, with an empty environment.

A process that has imported nothing but a little of the standard library, and that holds no secret,
forks and watches the programs, one after the other. It is neither the trainer, whose memory and
environment a program must not inherit, nor started anew for a program.

It reads requests on stdin and writes replies on stdout, as `wire` has them. When its caller goes,
stdin ends, and so do the program that runs and the server.
"""

import contextlib
import ctypes
import json
import os
import signal
import sys

_PR_SET_DUMPABLE = 4


def main() -> None:
    sys.path.insert(0, sys.argv[1])
    from megatron_opd.sandbox import folder, wire
    from megatron_opd.sandbox.limits import Limits
    from megatron_opd.sandbox.watch import CallerGone, Settings, trial, watched

    settings = Settings(**json.loads(sys.argv[2]))
    # Slurm sends these to all processes, and the trainer still finishes its step.
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    # Where the machine's memory ends, a program is killed before the trainer.
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    # A program in the same namespace must not read or write this process's memory.
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    requests, replies = 0, os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)
    os.set_inheritable(requests, False)
    try:
        wire.send(replies, {"ready": trial(settings, requests)})
        while True:
            header, (source, stdin) = wire.receive(requests)
            limits = Limits(**header["limits"])
            finished = watched(source, stdin, limits, settings, requests)
            streams = (finished.stdout, finished.stderr, finished.handed_back)
            outcome = {
                "reason": finished.reason,
                "exit_code": finished.exit_code,
                "cpu_seconds": finished.cpu_seconds,
                "wall_seconds": finished.wall_seconds,
            }
            wire.send(replies, outcome, *streams)
    except (CallerGone, wire.Ended):
        # the caller may have been killed; bubblewrap's folder is gone with its namespace
        with contextlib.suppress(OSError):
            folder.empty(settings.scratch)
            os.rmdir(settings.scratch)


if __name__ == "__main__":
    main()
