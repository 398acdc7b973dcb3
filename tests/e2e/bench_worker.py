"""bench_worker.py KILL_AFTER COUNTS ARGUMENT...: `megatron-opd ARGUMENT...`, which kills itself.

A process kills itself (SIGKILL) after it has kept so many completions; 0 for never. Every one that
it keeps is a line of the file COUNTS.
"""

import os
import signal
import sys
from typing import Any

from megatron_opd.bench.store import Store
from megatron_opd.cli.main import main

kept = 0


def counting(kill_after: int, counts: str) -> None:
    original = Store.keep_completion

    def keep_completion(self: Store, prompt: Any, written: Any) -> None:
        global kept
        original(self, prompt, written)
        kept += 1
        with open(counts, "a") as file:
            file.write(f"{prompt.key}\n")
        if kept == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)

    Store.keep_completion = keep_completion  # type: ignore[method-assign]


if __name__ == "__main__":
    counting(int(sys.argv[1]), sys.argv[2])
    sys.exit(main(sys.argv[3:]))
