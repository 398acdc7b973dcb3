"""An environment whose steps take fixed times. In a file of its own, so that a worker that plays it
imports little."""

import hashlib
import time

from megatron_opd.contracts.environments import Info

TURNS = 50  # as many as the papers give ALFWorld
STEP, SLOW_STEP = 0.06, 0.6  # seconds
SLOW_EVERY = 50  # steps


class Timed:
    """An environment whose steps take times that its task has drawn, the same in every episode."""

    def reset(self, *, seed: int, options: dict[str, str]) -> tuple[str, Info]:
        """Begins an episode of `TURNS` steps."""
        self._task = options["task_id"]
        self._steps = 0
        return "begun", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, Info]:
        """Sleeps."""
        self._steps += 1
        drawn = int.from_bytes(hashlib.sha256(f"{self._task} {self._steps}".encode()).digest()[:4])
        time.sleep(SLOW_STEP if drawn % SLOW_EVERY == 0 else STEP)
        return f"step {self._steps}", 0.0, False, self._steps >= TURNS, {}
