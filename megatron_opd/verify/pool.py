"""The verifier's workers, seen from the training process."""

import contextlib
import json
import logging
import os
import queue
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

from megatron_opd.contracts.rows import NOT_JUDGED, Row, Verdict
from megatron_opd.errors import RunError
from megatron_opd.recipe.keys import RewardConfig
from megatron_opd.verify.answer import content_of, final_answer, read_gold
from megatron_opd.verify.plain import compare_plain
from megatron_opd.verify.worker import wall_seconds

logger = logging.getLogger(__name__)

WORKER_MEMORY_BYTES = 2 * 1024**3
START_SECONDS = 120  # importing math-verify takes 1 to 4 s on an idle machine
GRACE_SECONDS = 10  # beyond the worker's own time limit, after which it counts as hung
SHARE_OF_BUDGET = 0.2  # the next answer's fraction of what is left of a step's budget
# The time of an answer when nothing is left; math-verify takes 1 to 50 ms, 150 for a first of its
# kind.
LEAST_SECONDS = 0.2
PACKAGE_ROOT = Path(__file__).resolve().parents[2]


class VerifierPool:
    """Scores completions against gold answers, with math-verify or the recipe's function.

    Workers are processes of their own, not forks, because this process has gloo threads and an
    inference engine. An answer that hangs, exhausts memory or crashes its evaluator costs at most
    `timeout_seconds` and scores 0. Many such answers cost at most `budget_seconds` and a fifth of a
    second each; other answers are not affected.
    """

    def __init__(self, config: RewardConfig, judge: str = "math") -> None:
        # one of verify/worker.py's, or the recipe's own
        self.config = config
        self._workers = [_Worker(config.function or judge) for _ in range(config.workers)]
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(config.workers, thread_name_prefix="reward")

    def warm_up(self) -> None:
        """Starts the workers without waiting for them."""
        for worker in self._workers:
            worker.start()

    def score(self, rows: Sequence[Row]) -> list[Row]:
        """The rows, in order, with their verdicts, and the score as `reward`.

        Reasons: correct, wrong, no_answer, truncated (by the token limit, before an answer),
        bad_gold, too_long, timeout, over_budget, crashed, error. Equal answers to equal gold
        answers are evaluated once.

        Raises RunError when a worker cannot start.
        """
        pairs = [(self._answer(row), row.task.answer.strip()) for row in rows]
        unique = dict.fromkeys((answer, gold) for answer, gold in pairs if answer is not None)
        grade = partial(self._grade, budget=_Budget(self.config))
        reasons = dict(zip(unique, self._threads.map(grade, unique), strict=True))
        scored = []
        for row, (answer, gold) in zip(rows, pairs, strict=True):
            reason = _without_answer(row) if answer is None else reasons[answer, gold]
            scored.append(_scored(row, reason))
        if count := sum(r.verdict.reason == "over_budget" for r in scored):
            words = "%d answers were not judged within reward.budget_seconds=%g and score 0"
            logger.warning(words, count, self.config.budget_seconds)
        return scored

    def replies(self, pairs: Sequence[tuple[str, str]]) -> list[str]:
        """The workers' replies to texts and what they are compared with, in their order.

        Beside the judge's: too_long, timeout, over_budget, crashed. Raises RunError.
        """
        budget = _Budget(self.config)

        def reply(pair: tuple[str, str]) -> str:
            too_long = len(pair[0]) > self.config.max_characters
            return "too_long" if too_long else self._judged(*pair, budget)

        unique = dict.fromkeys(pairs)
        replies = dict(zip(unique, self._threads.map(reply, unique), strict=True))
        return [replies[pair] for pair in pairs]

    def close(self) -> None:
        """Ends the workers; the pool cannot be used again. Idempotent."""
        for worker in self._workers:
            worker.interrupt()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in self._workers:
            worker.end()

    def __enter__(self) -> "VerifierPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self, row: Row) -> str | None:
        """The text to judge: the answer in a completion, or all of it for a user's function."""
        if self.config.function:
            return row.text
        return final_answer(row.text, self.config.answer, truncated=row.finish_reason == "length")

    def _grade(self, pair: tuple[str, str], budget: "_Budget") -> str:
        answer, gold_text = pair
        if self.config.function:
            return self._judged(answer, gold_text, budget)
        gold = read_gold(gold_text)
        if gold is None:
            return "bad_gold"
        if len(answer) > self.config.max_characters:
            return "too_long"
        if reason := compare_plain(content_of(answer), gold):
            return reason
        return self._judged(answer, gold, budget)

    def _judged(self, answer: str, gold: str, budget: "_Budget") -> str:
        """The reply of a worker."""
        worker = self._idle.get()
        try:
            return budget.charge(worker, answer, gold)
        finally:
            self._idle.put(worker)


class _Budget:
    """The time that the answers of one call may lose at their limits, for all workers together.

    An answer may take a fraction of what is left, up to `timeout_seconds`. Answers that end by
    themselves are not charged, so that the limits of an honest step never shrink, and a hostile
    answer takes little from those that follow it.
    """

    def __init__(self, config: RewardConfig) -> None:
        self._timeout_seconds = config.timeout_seconds
        self._left = config.budget_seconds
        self._lock = threading.Lock()

    def charge(self, worker: "_Worker", answer: str, gold: str) -> str:
        with self._lock:
            limit = min(self._timeout_seconds, max(SHARE_OF_BUDGET * self._left, LEAST_SECONDS))
        reason = worker.grade(answer, gold, limit)
        if reason != "timeout":
            return reason
        with self._lock:
            self._left = max(self._left - limit, 0.0)
        return "timeout" if limit == self._timeout_seconds else "over_budget"


def _without_answer(row: Row) -> str:
    return "truncated" if row.finish_reason == "length" else "no_answer"


def _scored(row: Row, reply: str) -> Row:
    reason, _, score_text = reply.partition(" ")
    score = float(score_text) if score_text else float(reason == "correct")
    if reason == "scored":
        reason = {1.0: "correct", 0.0: "wrong"}.get(score, "partly")
    correct = None if reason in NOT_JUDGED else score == 1
    verdict = Verdict(score, correct, reason)
    return replace(row, episode=replace(row.episode, verdict=verdict, reward=verdict.score))


class _WorkerDied(Exception):
    """The worker closed its pipe or stayed silent."""


class _Worker:
    """A `megatron_opd.verify.worker` process, started at the first need and again when it dies."""

    def __init__(self, judge: str) -> None:
        self.judge = judge
        self.process: subprocess.Popen[bytes] | None = None
        self.ready = False
        self.closed = False

    def start(self) -> None:
        if self.process is not None or self.closed:
            return
        search_path = [str(PACKAGE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        # A fixed hash seed fixes the order in which sympy walks its sets, so that the same answer
        # gets the same verdict.
        environment = dict(os.environ)
        environment["PYTHONPATH"] = os.pathsep.join(search_path)
        environment["PYTHONHASHSEED"] = "0"
        module = ["-P", "-m", "megatron_opd.verify.worker", str(WORKER_MEMORY_BYTES), self.judge]
        self.ready = False
        self.log = tempfile.TemporaryFile()  # noqa: SIM115  (closed by end)
        self.process = subprocess.Popen(
            [sys.executable, *module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env=environment,
            # Ctrl-C reaches the training process alone, and its close() ends the group.
            start_new_session=True,
        )

    def grade(self, answer: str, gold: str, limit_seconds: float) -> str:
        """The reason of the verdict, "timeout" at the limit.

        A worker that dies is replaced and asked once more.
        """
        for _ in range(2):
            try:
                self._wait_until_ready()
                return self._ask(answer, gold, limit_seconds)
            except _WorkerDied:
                self.end()
        if self.closed:
            raise RunError("the reward workers were closed while they graded")
        return "crashed"

    def interrupt(self) -> None:
        """Makes a `grade` that waits in another thread return, and refuses new ones."""
        self.closed = True
        self._signal_kill()

    def _ask(self, answer: str, gold: str, limit_seconds: float) -> str:
        process = self.process
        if process is None or process.stdin is None:
            raise _WorkerDied
        try:
            process.stdin.write(json.dumps([answer, gold, limit_seconds]).encode() + b"\n")
            process.stdin.flush()
        except OSError as error:
            raise _WorkerDied from error
        # The worker evaluates a request twice if its first evaluator was killed from outside.
        return self._read_line(2 * wall_seconds(limit_seconds) + GRACE_SECONDS)

    def _wait_until_ready(self) -> None:
        self.start()
        if self.ready or self.closed:
            return
        try:
            self.ready = self._read_line(START_SECONDS) == "ready"
        except _WorkerDied as error:
            if self.closed:
                raise
            self.log.seek(0)
            lines = self.log.read().decode(errors="replace").strip().splitlines()
            self.end()
            raise RunError(
                f"a reward worker did not start: {lines[-1] if lines else 'no output'}"
            ) from error

    def _read_line(self, seconds: float) -> str:
        process = self.process
        if process is None or process.stdout is None:
            raise _WorkerDied
        poll = select.poll()
        poll.register(process.stdout, select.POLLIN)
        deadline = time.monotonic() + seconds
        line = b""
        while not line.endswith(b"\n"):
            remaining = deadline - time.monotonic()
            if remaining <= 0 or not poll.poll(remaining * 1000):
                raise _WorkerDied
            received = os.read(process.stdout.fileno(), 4096)
            if not received:
                raise _WorkerDied
            line += received
        return line.decode().strip()

    def end(self) -> None:
        """Kills the process and its evaluator, and collects them."""
        self._signal_kill()
        process = self.process
        self.process = None
        if process is None:
            return
        process.wait()
        for file in (process.stdin, process.stdout, self.log):
            if file is not None:
                with contextlib.suppress(OSError):
                    file.close()

    def _signal_kill(self) -> None:
        process = self.process  # another thread may clear it
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
