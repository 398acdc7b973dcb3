"""One worker of the pool: its process, and the episodes that it holds."""

import contextlib
import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

from megatron_opd.contracts.environments import Observation
from megatron_opd.recipe.agents import EnvironmentConfig

START_SECONDS = 600.0  # imports, and what an environment loads when it is made
CLOSE_SECONDS = 2.0  # for the environments' own `close`
LOG_BYTES = 2**20  # of what an environment prints, before it is thrown away
PACKAGE = Path(__file__).resolve().parents[1]

Message = dict[str, Any]


class WorkerLost(Exception):
    """The process hung, died or wrote something strange, and was killed; the message says which."""


class DidNotStart(Exception):
    """The process ended before it was ready; the message is its last line."""


@dataclass
class Played:
    """An episode in a slot, as far as it has come: enough to play it again."""

    task_id: str
    seed: int
    actions: list[str] = field(default_factory=list)
    observations: list[Observation] = field(default_factory=list)
    lost: bool = False  # its process is another one now


class EnvironmentWorker:
    """A `megatron_opd.environments.worker`, started at the first need and again when it is lost.

    Called by one thread. A call that hangs, raises, ends the process or is answered by something
    strange fails its own episode. Other episodes of the same process are played again, by their
    actions, when they go on.
    """

    def __init__(self, kind: str, config: EnvironmentConfig) -> None:
        self.kind = kind
        self.config = config
        self.episodes: dict[int, Played] = {}
        self.seconds = {"reset": 0.0, "step": 0.0}  # within environments
        self.calls = {"reset": 0, "step": 0}
        self.process: subprocess.Popen[bytes] | None = None
        self._ready = False
        self._received = b""
        self._closed = False

    # ---------------------------------------------------------------------------------- episodes
    def reset(self, slot: int, task_id: str, seed: int) -> Observation:
        """Begins an episode. Raises DidNotStart."""
        self._notice_death()
        self.episodes[slot] = Played(task_id, seed)
        return self._play(slot, None)

    def step(self, slot: int, action: str) -> Observation:
        """Raises DidNotStart."""
        self._notice_death()
        episode = self.episodes.get(slot)
        if episode is None:
            return Observation("", failed="a step without an episode")
        if episode.lost and (failed := self._restore(slot, episode)):
            return self._failed(slot, failed)
        return self._play(slot, action)

    def expert_action(self, slot: int) -> str | None:
        """What the environment's own scripted policy would do now; None where it has none."""
        reply = self._ask({"op": "expert", "slot": slot}, self.config.step_seconds)
        return reply.get("action")

    def task_ids(self, split: str) -> list[str] | str:
        """The tasks of a split, or in one line why there are none. Raises DidNotStart."""
        try:
            reply = self._ask({"op": "task_ids", "split": split}, self.config.reset_seconds)
        except WorkerLost as error:
            return str(error)
        return reply.get("failed") or reply["task_ids"]

    def _play(self, slot: int, action: str | None) -> Observation:
        """A reset, or a step with `action`, and what is remembered of it."""
        episode = self.episodes[slot]
        try:
            observation = self._call(slot, episode, action)
        except WorkerLost as error:
            return self._failed(slot, str(error))
        if observation.ended:
            del self.episodes[slot]
            return observation
        if action is not None:
            episode.actions.append(action)
        episode.observations.append(observation)
        return observation

    def _restore(self, slot: int, episode: Played) -> str:
        """Plays an episode again in a new process. Returns why that failed."""
        for action, seen in zip([None, *episode.actions], episode.observations, strict=True):
            try:
                observation = self._call(slot, episode, action)
            except WorkerLost as error:
                return f"played again, because its process was lost: {error}"
            if observation.failed:
                return f"played again, because its process was lost: {observation.failed}"
            if observation != seen:
                return (
                    "is not deterministic: played again with the same seed and actions, because "
                    "its process was lost, it answered otherwise"
                )
        episode.lost = False
        return ""

    def _call(self, slot: int, episode: Played, action: str | None) -> Observation:
        if action is None:
            operation, limit = "reset", self.config.reset_seconds
            request: Message = {"task_id": episode.task_id, "seed": episode.seed}
        else:
            operation, limit = "step", self.config.step_seconds
            request = {"action": action}
        reply = self._ask({"op": operation, "slot": slot, **request}, limit)
        self.calls[operation] += 1
        self.seconds[operation] += reply["seconds"]
        if "failed" in reply:
            return Observation("", failed=f"{operation}: {reply['failed']}")
        observation = Observation(**reply["observation"])
        if observation.admissible is not None:
            observation = replace(observation, admissible=tuple(observation.admissible))
        return observation

    def _failed(self, slot: int, reason: str) -> Observation:
        self.episodes.pop(slot, None)
        return Observation("", failed=reason)

    # ----------------------------------------------------------------------------------- process
    def start(self) -> None:
        """Starts the process without waiting for it. Raises DidNotStart."""
        if self.process is not None:
            return
        if self._closed:
            raise DidNotStart("the pool is closed")
        # Another interpreter gets this package alone, and no other that lies beside it.
        self._folder = tempfile.TemporaryDirectory(prefix="megatron-opd-")
        os.symlink(PACKAGE, Path(self._folder.name, PACKAGE.name))
        search_path = [self._folder.name, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = dict(os.environ)
        environment["PYTHONPATH"] = os.pathsep.join(search_path)
        environment["PYTHONHASHSEED"] = "0"  # replays walk sets in the same order
        environment.setdefault("OMP_NUM_THREADS", "1")
        environment["PYTHONSAFEPATH"] = "1"  # the option -P, which Python 3.10 does not know
        module = ["-m", "megatron_opd.environments.worker"]
        arguments = [self.kind, json.dumps(self.config.options)]
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (closed by _end)
        fcntl.fcntl(self._log, fcntl.F_SETFL, os.O_APPEND)  # so that it can be cut
        self._received = b""
        self._ready = False
        try:
            self.process = subprocess.Popen(
                [self.config.python or sys.executable, *module, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env=environment,
                # Ctrl-C reaches the training process alone, and its close() ends the group.
                start_new_session=True,
            )
        except OSError as error:
            self._folder.cleanup()
            raise DidNotStart(f"{self.config.python}: {error.strerror}") from None
        if self._closed:
            self.interrupt()

    def wait_until_ready(self) -> None:
        """Raises DidNotStart."""
        self.start()
        if self._ready:
            return
        try:
            reply = self._read(START_SECONDS, "its start")
        except WorkerLost as error:
            raise DidNotStart(str(error)) from None
        if "failed" in reply:
            self._end()
            raise DidNotStart(reply["failed"])
        self._ready = True

    def close(self) -> None:
        """Lets environments close themselves, and ends the process."""
        if self.process is not None and self._ready:
            with contextlib.suppress(WorkerLost, DidNotStart):
                self._ask({"op": "close"}, CLOSE_SECONDS)
        self._end()

    def interrupt(self) -> None:
        """Makes a call that waits in another thread return, and refuses new ones."""
        self._closed = True
        self._kill()

    def _kill(self) -> None:
        process = self.process  # another thread may clear it
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def _ask(self, request: Message, limit: float) -> Message:
        self.wait_until_ready()
        process = self.process
        assert process is not None and process.stdin is not None
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
        except OSError:
            self._lose("its process ended")
        reply = self._read(limit, request["op"])
        if os.fstat(self._log.fileno()).st_size > LOG_BYTES:
            self._log.truncate(0)
        return reply

    def _read(self, seconds: float, what: str) -> Message:
        """The next line of the process, which is lost where there is none within the limit."""
        process = self.process
        assert process is not None and process.stdout is not None
        poll = select.poll()
        poll.register(process.stdout, select.POLLIN)
        deadline = time.monotonic() + seconds
        while b"\n" not in self._received:
            remaining = max(deadline - time.monotonic(), 0.0)
            if not poll.poll(remaining * 1000):
                self._lose(f"{what} took longer than {seconds:g} s", says_why=False)
            received = os.read(process.stdout.fileno(), 65536)
            if not received:
                self._lose(f"its process ended during {what}")
            self._received += received
        line, _, self._received = self._received.partition(b"\n")
        try:
            return dict(json.loads(line))
        except ValueError:
            self._lose(f"its process answered {line[:80]!r}")

    def _notice_death(self) -> None:
        """A process that ended between two calls is nobody's fault."""
        if self.process is not None and self.process.poll() is not None:
            with contextlib.suppress(WorkerLost):
                self._lose("its process ended")

    def _lose(self, reason: str, *, says_why: bool = True) -> NoReturn:
        """Ends the process, whose last line, unless it hung, says why."""
        last_line = self._end() if says_why else self._end() and ""
        for episode in self.episodes.values():
            episode.lost = True
        raise WorkerLost(f"{reason} ({last_line})" if last_line else reason)

    def _end(self) -> str:
        """Kills the process and what it started. Returns the last line of its stderr."""
        process = self.process
        if process is None:
            return ""
        self._kill()
        process.wait()
        self.process = None
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        for file in (process.stdin, process.stdout, self._log):
            if file is not None:
                with contextlib.suppress(OSError):
                    file.close()
        self._folder.cleanup()
        return lines[-1] if lines else ""
