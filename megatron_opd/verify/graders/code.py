"""The grader of programs: LiveCodeBench's tests, each in a process of a sandbox.

The process only computes: what it printed or returned is compared here, with what it never saw.
"""

import contextlib
import math
import os
import platform
import queue
import secrets
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path

from megatron_opd.contracts.rows import Verdict
from megatron_opd.contracts.suites import Answer, Question
from megatron_opd.errors import ConfigError
from megatron_opd.sandbox.layers import ALLOW_WEAK, Layers, layers
from megatron_opd.sandbox.limits import MIB, Finished, Limits
from megatron_opd.sandbox.run import Sandbox
from megatron_opd.verify.graders.code_answer import program_in, same_output, same_value
from megatron_opd.verify.graders.code_program import program_of
from megatron_opd.verify.graders.code_tests import BadTests, CodeTests, read_tests
from megatron_opd.verify.graders.reasoning import conclusion, no_answer

# What a verdict says where a test's process did not end by itself with an answer.
REASONS = {
    "failed": "exception",
    "crashed": "exception",
    "timeout": "timeout",
    "memory": "memory",
    "output": "too_long",
    "files": "exception",
    "threads": "exception",
    "lost": "crashed",  # the sandbox's fault, not the answer's
}
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # a container's microseconds in a period, and the period


@dataclass(frozen=True)
class CodeOptions:
    """The grader's options, `grading` in a suite's protocol."""

    cpu_seconds: float = 6.0  # of a test; LiveCodeBench's limit, which it takes of wall time
    wall_seconds: float = 24.0  # of a test, for a busy machine
    memory_gib: float = 2.0  # of a test's address space; LiveCodeBench has no limit
    workers: int = 0  # tests at a time; 0: one on every core, shared by a machine's ranks
    packages: Sequence[str] = ("numpy",)  # that a program may import; LiveCodeBench has this one


def options_of(grading: Mapping[str, object]) -> CodeOptions:
    """Raises ConfigError."""
    kinds = {field.name: type(field.default) for field in fields(CodeOptions)}
    packages = grading.get("packages", ())
    if isinstance(packages, str) or not isinstance(packages, Sequence):
        raise ConfigError(f"grading.packages: {packages!r} must be a list of names")
    if not all(isinstance(name, str) and name.isidentifier() for name in packages):
        raise ConfigError(f"grading.packages: {packages!r} must be names of packages")
    for name, value in grading.items():
        if name == "packages":
            continue
        kind = kinds.get(name)
        if kind is None:
            raise ConfigError(f"grading.{name}: the code grader has {', '.join(kinds)}")
        allowed = (int, float) if kind is float else kind
        if not isinstance(value, allowed) or isinstance(value, bool):
            raise ConfigError(f"grading.{name}: {value!r} must be a {kind.__name__}")
        if not float(str(value)) >= 0:
            raise ConfigError(f"grading.{name}: {value!r} must not be negative")
    return CodeOptions(**dict(grading))  # type: ignore[arg-type]  # checked above


def refusal_of(grading: Mapping[str, object]) -> str:
    """Why this machine grades no programs; "" where it does. Raises ConfigError."""
    options = options_of(grading)
    return layers(options.packages).refusal(allow_weak=_weak_allowed())


class CodeGrader:
    """Judges programs by a problem's tests; the first one that fails decides.

    Reasons: correct, wrong, exception, timeout, memory, too_long (its output), no_answer, truncated
    (before a closed block), bad_gold (no tests that can be run), crashed (its sandbox failed).
    Equal programs of a problem are judged once.
    """

    def __init__(self, grading: Mapping[str, object], there: Layers | None = None) -> None:
        """Raises ConfigError where programs are not run; `there` is this machine's layers."""
        self.options = options_of(grading)
        there = there or layers(self.options.packages)
        weak = _weak_allowed()
        if refusal := there.refusal(allow_weak=weak):
            raise ConfigError(refusal)
        count = self.options.workers or _cores_of_this_process()
        self._sandboxes = [Sandbox(there, allow_weak=weak) for _ in range(count)]
        # those that have started come first
        self._idle: queue.LifoQueue[Sandbox] = queue.LifoQueue()
        for sandbox in self._sandboxes:
            self._idle.put(sandbox)
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="code")
        self.versions: Mapping[str, str] = {
            "python": platform.python_version(),
            "sandbox": " ".join(there.names()),
        }

    def grade(self, answers: Sequence[Answer]) -> list[Verdict]:
        """The verdicts in their order. Raises RunError when a sandbox does not start."""
        programs = [program_in(conclusion(answer) or "") for answer in answers]
        keys = [answer.asked.question.key for answer in answers]
        judged = dict.fromkeys(pair for pair in zip(keys, programs, strict=True) if pair[1])
        open_pairs = Counter(key for key, _ in judged)
        problems = {
            answer.asked.question.key: _Problem(answer.asked.question, open_pairs[key])
            for answer, key in zip(answers, keys, strict=True)
        }
        verdicts = self._threads.map(lambda pair: self._judge(problems[pair[0]], pair[1]), judged)
        of_pairs = dict(zip(judged, verdicts, strict=True))
        return [
            of_pairs[key, program] if program else Verdict(0.0, False, no_answer(answer))
            for answer, key, program in zip(answers, keys, programs, strict=True)
        ]

    def close(self) -> None:
        """Ends the sandboxes; the grader cannot be used again. Idempotent."""
        for sandbox in self._sandboxes:
            sandbox.interrupt()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for sandbox in self._sandboxes:
            sandbox.close()

    def __enter__(self) -> "CodeGrader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _judge(self, problem: "_Problem", code: str) -> Verdict:
        try:
            tests = problem.tests()
        except BadTests:
            return Verdict(0.0, None, "bad_gold", code)
        sandbox = self._idle.get()
        try:
            reason = self._reason(sandbox, tests, code)
        finally:
            self._idle.put(sandbox)
            problem.done()
        correct = None if reason == "crashed" else reason == "correct"
        return Verdict(float(correct or 0.0), correct, reason, code)

    def _reason(self, sandbox: Sandbox, tests: CodeTests, code: str) -> str:
        program = program_of(code, tests.function)
        for given, expected in zip(tests.inputs, tests.outputs, strict=True):
            nonce = secrets.token_hex(16) if tests.function else ""
            stdin = f"{nonce}\n{given.strip()}" if tests.function else given
            finished = sandbox.run(program, stdin.encode(errors="replace"), self._limits(expected))
            if reason := REASONS.get(finished.reason):
                return reason
            if not _as_expected(finished, nonce, expected):
                return "wrong"
        return "correct"

    def _limits(self, expected: str) -> Limits:
        return Limits(
            cpu_seconds=self.options.cpu_seconds,
            wall_seconds=self.options.wall_seconds,
            memory_bytes=int(self.options.memory_gib * 1024 * MIB),
            output_bytes=max(MIB, 4 * len(expected) + MIB // 16),
        )


class _Problem:
    """A question whose tests are read when the first of its programs is judged, and forgotten
    behind the last one: they can be large."""

    def __init__(self, question: Question, programs: int) -> None:
        self._question = question
        self._left = programs
        self._tests: CodeTests | None = None
        self._lock = threading.Lock()

    def tests(self) -> CodeTests:
        """Raises BadTests."""
        with self._lock:
            self._tests = self._tests or read_tests(self._question.details)
            return self._tests

    def done(self) -> None:
        with self._lock:
            self._left -= 1
            if not self._left:
                self._tests = None


def _weak_allowed() -> bool:
    """Whether this machine allows a weak sandbox; no protocol does, as no score depends on it."""
    return os.environ.get(ALLOW_WEAK, "") not in ("", "0")


def _cores_of_this_process() -> int:
    """Its share: every rank of a machine grades its own answers at the same time."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cores = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):  # no file, or no quota ("max")
        quota, period = map(int, CPU_QUOTA.read_text().split())
        cores = min(cores, math.ceil(quota / period))
    return max(1, cores // ranks)


def _as_expected(finished: Finished, nonce: str, expected: str) -> bool:
    if nonce:
        return same_value(finished.handed_back, nonce, expected)
    return same_output(finished.stdout, expected)
