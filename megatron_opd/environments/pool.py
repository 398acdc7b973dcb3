"""The environments' workers, seen from the training process."""

import contextlib
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import psutil

from megatron_opd.contracts.environments import Observation
from megatron_opd.environments.process import DidNotStart, EnvironmentWorker, WorkerLost
from megatron_opd.errors import RunError
from megatron_opd.recipe.agents import EnvironmentConfig

_T = TypeVar("_T")


class EnvironmentPool:
    """Environments in processes of their own, not forks: see contracts.environments.Environments.

    A thread waits for each process, so that the processes go on while the training process
    generates, and no slot waits for one of another process. An episode begins in the process that
    holds the fewest.
    """

    def __init__(self, kind: str, config: EnvironmentConfig) -> None:
        self.config = config
        self._answers: queue.SimpleQueue[tuple[int, Observation | Exception]] = queue.SimpleQueue()
        self._lanes = [_Lane(kind, config) for _ in range(config.workers)]
        self._lane_of: dict[int, _Lane] = {}
        self._open: set[int] = set()  # slots with a call that was not answered

    def warm_up(self) -> None:
        """Starts the processes without waiting for them."""
        for lane in self._lanes:
            lane.put(lane.start)

    def reset(self, slot: int, task_id: str, seed: int) -> None:
        lane = self._lane_of.get(slot)
        if lane is None:
            lane = min(self._lanes, key=lambda lane: len(lane.slots))
            self._lane_of[slot] = lane
            lane.slots.add(slot)
        self._begin(slot, lane, lambda: lane.worker.reset(slot, task_id, seed))

    def step(self, slot: int, action: str) -> None:
        lane = self._lane_of[slot]
        self._begin(slot, lane, lambda: lane.worker.step(slot, action))

    def ready(self, timeout: float) -> list[tuple[int, Observation]]:
        """Raises RunError when no process starts."""
        answers: list[tuple[int, Observation]] = []
        try:
            while True:
                slot, answer = self._answers.get(timeout=0 if answers else timeout)
                if isinstance(answer, Exception):
                    raise answer
                self._open.discard(slot)
                if answer.ended:
                    self._lane_of.pop(slot).slots.discard(slot)
                answers.append((slot, answer))
        except queue.Empty:
            return answers

    def task_ids(self, split: str) -> list[str]:
        lane = min(self._lanes, key=lambda lane: len(lane.slots))
        answer = lane.call(lambda: lane.worker.task_ids(split))
        if isinstance(answer, str):
            raise RunError(f"environment {self.config.kind}: the tasks of {split}: {answer}")
        return answer

    def expert_action(self, slot: int) -> str | None:
        """What the environment's own scripted policy would do now; None where it has none."""
        lane = self._lane_of[slot]
        return lane.call(lambda: lane.worker.expert_action(slot))

    def rates(self) -> dict[str, tuple[int, float]]:
        """The resets and the steps so far, and the seconds that they took within the
        environments."""
        workers = [lane.worker for lane in self._lanes]
        return {
            name: (sum(w.calls[name] for w in workers), sum(w.seconds[name] for w in workers))
            for name in ("reset", "step")
        }

    def memory_bytes(self) -> list[int]:
        """The resident memory of every process that runs, its children's included."""
        sizes = []
        for lane in self._lanes:
            if (process := lane.worker.process) is not None:
                family = psutil.Process(process.pid)
                members = [family, *family.children(recursive=True)]
                sizes.append(sum(member.memory_info().rss for member in members))
        return sizes

    def close(self) -> None:
        """Ends the processes; the pool cannot be used again. Idempotent."""
        for lane in self._lanes:
            lane.end()
        for lane in self._lanes:
            lane.join()

    def __enter__(self) -> "EnvironmentPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self, slot: int, lane: "_Lane", call: Callable[[], Observation]) -> None:
        assert slot not in self._open, f"slot {slot} has a call open"
        self._open.add(slot)
        lane.put(lambda: self._answers.put((slot, lane.observed(call))))


class _Lane:
    """A worker, the thread that waits for it, and the calls that wait for the thread."""

    def __init__(self, kind: str, config: EnvironmentConfig) -> None:
        self.worker = EnvironmentWorker(kind, config)
        self.slots: set[int] = set()
        self._has_started = False
        self._busy = False
        self._closing = False
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="environment", daemon=True)
        self._thread.start()

    def put(self, call: Callable[[], None]) -> None:
        """Runs `call`, which raises nothing, in the thread, behind those that wait already."""
        self._calls.put(call)

    def call(self, function: Callable[[], _T]) -> _T:
        """What a function that asks the worker returns. Raises RunError."""
        future: Future[_T] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

        self.put(run)
        try:
            return future.result()
        except (DidNotStart, WorkerLost) as error:
            raise self._did_not_start(str(error)) from None

    def start(self) -> None:
        with contextlib.suppress(DidNotStart):  # the first call raises it again
            self.worker.start()

    def observed(self, call: Callable[[], Observation]) -> Observation | Exception:
        """A worker's answer. A worker that has never started is an error for all."""
        try:
            observation = call()
        except DidNotStart as error:
            if self._has_started:
                return Observation("", failed=f"its process did not start again: {error}")
            return self._did_not_start(str(error))
        except Exception as error:  # a defect of ours, which must not leave the caller waiting
            return error
        self._has_started = True
        return observation

    def end(self) -> None:
        """Ends the worker and the thread, without waiting for them."""
        self._closing = True
        if self._busy:
            self.worker.interrupt()
        self._calls.put(None)

    def join(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            self._busy = True
            if not self._closing:
                call()
            self._busy = False
        self.worker.close()

    def _did_not_start(self, reason: str) -> RunError:
        return RunError(f"environment {self.worker.config.kind}: {reason}")
