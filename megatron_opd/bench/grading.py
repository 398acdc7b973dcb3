"""Grading beside generation: a thread gives completions to the graders of their suites."""

import queue
import threading
from collections.abc import Callable, Mapping
from itertools import groupby
from typing import Self

from megatron_opd.bench.store import Key
from megatron_opd.contracts.rows import Verdict
from megatron_opd.contracts.suites import Answer, Grader
from megatron_opd.evaluation.writers import Written
from megatron_opd.suites.asking import SuitePrompt

AT_ONCE = 256  # completions of one call


class Grading:
    """Grades what it is given, in order, and calls `keep` for every verdict in its thread.

    Leaving the block waits until all is graded. Raises the exception of a grader there, or at the
    next `give`.
    """

    def __init__(self, graders: Mapping[str, Grader], keep: Callable[[Key, Verdict], None]) -> None:
        self._graders = graders
        self._keep = keep
        self._given: queue.Queue[tuple[SuitePrompt, Written] | None] = queue.Queue()
        self._failure: BaseException | None = None
        self._abandoned = False
        self._thread = threading.Thread(target=self._work, name="grading", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._abandoned = kind is not None
        self._given.put(None)
        if kind is None:  # an interrupted evaluation does not wait: the next one grades the rest
            self._thread.join()
            self._raise_failure()

    @property
    def waiting(self) -> int:
        """The number of completions that are not graded yet, about."""
        return self._given.qsize()

    def give(self, prompt: SuitePrompt, written: Written) -> None:
        """Returns at once."""
        self._raise_failure()
        self._given.put((prompt, written))

    def _raise_failure(self) -> None:
        if self._failure:
            raise self._failure

    def _work(self) -> None:
        try:
            ended = False
            while not ended:
                batch = self._next_batch()
                ended = None in batch
                pairs = [pair for pair in batch if pair]
                for suite, of_suite in groupby(pairs, key=lambda pair: pair[0].suite):
                    self._grade(suite, list(of_suite))
        except BaseException as error:
            self._failure = error

    def _next_batch(self) -> list[tuple[SuitePrompt, Written] | None]:
        """All that waits, at least one; None ends the work."""
        batch = [self._given.get()]
        while len(batch) < AT_ONCE and batch[-1] is not None:
            try:
                batch.append(self._given.get_nowait())
            except queue.Empty:
                break
        return batch

    def _grade(self, suite: str, pairs: list[tuple[SuitePrompt, Written]]) -> None:
        answers = []
        for prompt, one in pairs:
            answers.append(Answer.to(prompt.text, prompt.asked, one.text, truncated=one.truncated))
        verdicts = self._graders[suite].grade(answers)
        if self._abandoned:  # graders that were closed meanwhile give verdicts that mean nothing
            return
        for (prompt, _), verdict in zip(pairs, verdicts, strict=True):
            self._keep(prompt.key, verdict)
