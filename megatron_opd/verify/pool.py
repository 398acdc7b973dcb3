"""The verifier's workers, seen from the training process."""

import logging
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

from megatron_opd.contracts.rows import Row
from megatron_opd.recipe.rewards import RewardConfig
from megatron_opd.verify.answer import content_of, final_answer, read_gold
from megatron_opd.verify.plain import compare_plain
from megatron_opd.verify.process import WorkerProcess
from megatron_opd.verify.replies import verdict_of, warn_of_errors

logger = logging.getLogger(__name__)

SHARE_OF_BUDGET = 0.2  # the next answer's fraction of what is left of a step's budget
# The time of an answer when nothing is left; math-verify takes 1 to 50 ms, 150 for a first of its
# kind.
LEAST_SECONDS = 0.2


class VerifierPool:
    """Scores completions against gold answers, with math-verify or the recipe's function.

    Workers are processes of their own, not forks, because this process has gloo threads and an
    inference engine. An answer that hangs, exhausts memory or crashes its evaluator costs at most
    `timeout_seconds` and scores 0. Many such answers cost at most `budget_seconds` and a fifth of a
    second each; other answers are not affected.
    """

    def __init__(self, config: RewardConfig, *judge: str) -> None:
        """`judge`: one of verify/worker.py's, and its function; without one, the recipe's."""
        self.config = config
        if not judge:
            judge = ("texts", config.function) if config.function else ("math",)
        self._workers = [WorkerProcess(*judge) for _ in range(config.workers)]
        self._idle: queue.SimpleQueue[WorkerProcess] = queue.SimpleQueue()
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
        warn_of_errors(list(reasons.values()))
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

    def charge(self, worker: WorkerProcess, answer: str, gold: str) -> str:
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
    verdict = verdict_of(reply)
    return replace(row, episode=replace(row.episode, verdict=verdict, reward=verdict.score))
