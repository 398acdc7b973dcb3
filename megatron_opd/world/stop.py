"""How a process is asked to stop."""

import os
import signal
from types import FrameType


class StopRequest:
    """Ctrl-C and SIGTERM ask the loop to stop after the present step; a second one ends the process
    at once.

    SIGUSR1 asks for the same: it is what Slurm sends ahead of a time limit.
    """

    def __init__(self) -> None:
        self.asked = self.out_of_time = False
        self._before = {
            s: signal.signal(s, self._handle)
            for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        }

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self.out_of_time = True
        elif self.asked:
            os._exit(130)
        self.asked = True

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
