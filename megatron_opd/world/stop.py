"""Signals that ask a process to stop."""

import os
import signal
from types import FrameType


class StopRequest:
    """A request to stop after the present step, by Ctrl-C, SIGTERM or SIGUSR1.

    A second Ctrl-C or SIGTERM ends the process at once. SIGUSR1 comes from Slurm ahead of a time
    limit.
    """

    def __init__(self) -> None:
        self.asked = False
        self.out_of_time = False
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        self._before = {number: signal.signal(number, self._handle) for number in numbers}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self.out_of_time = True
        elif self.asked:
            os._exit(130)
        self.asked = True

    def restore(self) -> None:
        """Gives the signals their earlier handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
