"""A verifier's worker: `python -m megatron_opd.verify.worker MEMORY_BYTES JUDGE [FUNCTION]`.

JUDGE is "math", "items", "legacy" or "following" of suites' graders, "pattern" for a regular
expression, or "texts" or "row" for a user's FUNCTION, "module:function", of an answer and its gold
answer, or of a completion with its prompt, row and tokens.

It reads a JSON list [answer, gold, time limit in seconds] per line on stdin and writes one reason
per line on stdout, followed by the score if a user's function gives one. This process only imports
math-verify, or the function, and forks; a child evaluates, under interval timers and a memory
limit. At the limit the kernel ends the child even in the middle of a C loop; the next fork takes
milliseconds, while a new process would need seconds for its imports. The limit is of processor
time, so that a busy machine does not change rewards.
"""

import functools
import gc
import json
import math
import os
import re
import resource
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import ModuleType
from typing import Any

# The signals that end an evaluator: at its processor time, and at its wall time.
AT_THE_LIMIT = (signal.SIGPROF, signal.SIGALRM)
WALL_TIME_FACTOR = 4  # an answer's wall time on a busy machine, relative to its processor time
LEAST_WALL_SECONDS = 3.0  # wall time of an answer with little processor time, on a crowded core
# Answers of every kind fill the parser's and sympy's caches, which all evaluators then inherit.
WARM_UP = (
    (r"\sqrt{4}", "2"),
    ("3x", "4x"),
    ("x^2+1", "(1+x)^2"),
    (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}"),
    (r"\sin x", r"\cos x"),
    ("(1,2]", "(1,3]"),
    (r"\{1,2\}", "2,3"),
    ("x=1", "x=2"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\3\end{pmatrix}"),
)


Judge = Callable[[str, str], str]  # (answer or completion, gold) -> a reply line


def math_judge() -> Judge:
    """math-verify, warmed up."""
    from megatron_opd.verify.answer import boxed
    from megatron_opd.verify.math import grade

    for answer, gold in WARM_UP:
        grade(boxed(answer), gold)
    return grade


def item_judge() -> Judge:
    """The judge of suites: math-verify, and the rules that an item brings."""
    from megatron_opd.verify.graders.items import judge_item

    math_judge()
    return judge_item


def legacy_judge() -> Judge:
    """math-verify without our reading of numbers."""
    from megatron_opd.verify.graders.items import judge_legacy

    math_judge()
    return judge_legacy


def following_judge() -> Judge:
    """The judge of IFBench."""
    import nltk

    # The package downloads what it misses when it is imported; what it needs was checked before.
    nltk.download = lambda *_, **__: False
    # It imports a library with which it would read its questions. We read them, and need none.
    reading = ModuleType("datasets")
    vars(reading)["load_dataset"] = None
    sys.modules.setdefault("datasets", reading)
    from megatron_opd.verify.graders.following import judge_following

    return judge_following


def pattern_judge() -> Judge:
    """Whether a regular expression matches all of a text; it may take for ever."""
    compiled = functools.cache(partial(re.compile, flags=re.DOTALL))

    def judge(text: str, pattern: str) -> str:
        return "correct" if compiled(pattern).fullmatch(text) else "wrong"

    return judge


JUDGES = {
    "math": math_judge,
    "items": item_judge,
    "legacy": legacy_judge,
    "following": following_judge,
    "pattern": pattern_judge,
}


def texts_judge(reference: str) -> Judge:
    """The user's function of two texts: "scored" and its number; "error" and why there is none."""
    function = _own(reference)

    def judge(completion: str, gold: str) -> str:
        try:
            score = float(function(completion, gold))
        except Exception as error:  # a hostile completion may make it raise anything
            return _error(error)
        return f"scored {score!r}" if 0 <= score <= 1 else f"error {score!r} is not from 0 to 1"

    return judge


def row_judge(reference: str) -> Judge:
    """The user's function of (prompt, completion, row, tokens), which stand in the first text as
    JSON: "scored" and its number, "judged" and its verdict as JSON, or "error" and why not."""
    function = _own(reference)

    def judge(arguments: str, _: str) -> str:
        try:
            return _reply(function(*json.loads(arguments)))
        except Exception as error:
            return _error(error)

    return judge


FUNCTION_JUDGES = {"texts": texts_judge, "row": row_judge}
_LONGEST_ERROR = 200  # characters of an exception's text
_REASON = re.compile(r"[\w.-]{1,40}")  # it becomes a part of a metric's name


def _own(reference: str) -> Callable[..., Any]:
    from megatron_opd.files.own_code import load_own

    function = load_own(reference)
    assert callable(function), "checked before the run"
    return function


def _reply(value: Any) -> str:
    """The reply to what a user's function returns: a number, or a verdict."""
    if not hasattr(value, "score"):
        score = float(value)
        finite = math.isfinite(score)
        return f"scored {score!r}" if finite else f"error {score!r} is no finite number"
    score = float(value.score)
    if not math.isfinite(score):
        return f"error a verdict's score {score!r} is no finite number"
    if not isinstance(value.reason, str) or not _REASON.fullmatch(value.reason):
        return f"error a verdict's reason must be a word, got {value.reason!a:.60}"
    correct = None if value.correct is None else bool(value.correct)
    extracted = str(value.extracted)
    return f"judged {json.dumps([score, correct, value.reason, extracted])}"


def _error(error: Exception) -> str:
    text = " ".join(ascii(str(error))[1:-1].replace("\\n", " ").split())
    return f"error {type(error).__name__}: {text[:_LONGEST_ERROR]}"


class Evaluator:
    """A forked child that answers requests until an answer kills it."""

    def __init__(self, memory_bytes: int, judge: Judge) -> None:
        parent_end, child_end = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                parent_end.close()
                evaluate_requests(child_end.makefile("rwb"), memory_bytes, judge)
            finally:
                os._exit(1)  # the child must not go on with the parent's loop
        child_end.close()
        self.stream = parent_end.makefile("rwb")
        parent_end.close()

    def ask(self, request: bytes) -> bytes:
        """The line of the reply; b"" when the child died."""
        try:
            self.stream.write(request)
            self.stream.flush()
            return self.stream.readline()
        except OSError:
            return b""

    def bury(self) -> int:
        """Collects the dead child; returns the signal that ended it, 0 for none."""
        _, status = os.waitpid(self.pid, 0)
        with suppress(OSError):
            self.stream.close()
        return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def wall_seconds(limit_seconds: float) -> float:
    """The wall time after which an answer is ended, given its limit of processor time."""
    return max(WALL_TIME_FACTOR * limit_seconds, LEAST_WALL_SECONDS)


def evaluate_requests(stream: Any, memory_bytes: int, judge: Judge) -> None:
    """The child's loop: answers the requests on `stream`."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1):  # prints of the libraries must not reach the protocol
        os.dup2(null, descriptor)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in AT_THE_LIMIT:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, AT_THE_LIMIT)
    for request in stream:
        answer, gold, limit_seconds = json.loads(request)
        signal.setitimer(signal.ITIMER_PROF, limit_seconds)
        signal.setitimer(signal.ITIMER_REAL, wall_seconds(limit_seconds))
        reply = judge(answer, gold)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        stream.write(reply.encode() + b"\n")
        stream.flush()


def main() -> None:
    memory_bytes = int(sys.argv[1])
    # Slurm sends these to all processes, and the trainer still finishes its step.
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    name, *functions = sys.argv[2:]
    judge = FUNCTION_JUDGES[name](*functions) if functions else JUDGES[name]()
    # A collection in an evaluator would touch, and so copy, every page that it inherited.
    gc.freeze()
    replies = sys.stdout.buffer
    replies.write(b"ready\n")
    replies.flush()
    evaluator: Evaluator | None = None
    for request in sys.stdin.buffer:
        reply = b"crashed\n"
        for _ in range(2):  # a child that something else killed gets the request a second time
            evaluator = evaluator or Evaluator(memory_bytes, judge)
            if answered := evaluator.ask(request):
                reply = answered
                break
            ended_by = evaluator.bury()
            evaluator = None
            if ended_by in AT_THE_LIMIT:
                reply = b"timeout\n"
                break
        replies.write(reply)
        replies.flush()


if __name__ == "__main__":
    main()
