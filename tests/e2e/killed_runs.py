"""killed_runs.py OUT PHASES RECIPE KEY=VALUE...: runs killed in a phase of a step, and resumed.

For every phase of PHASES, "a,b", a process trains into OUT/<phase> and kills itself (SIGKILL) in
that phase of step `KILLED_AT`; a second one resumes. OUT/whole is a run that nothing disturbs. All
are forked from this process, which has imported everything, so that a run costs seconds; as many at
a time as there are cores. OUT/<phase>.ended has the signal that ended the first and the exit code
of the other.
"""

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron_opd import loop
from megatron_opd.environments.pool import EnvironmentPool
from megatron_opd.objective.loss import Objective
from megatron_opd.recipe.keys import RunConfig
from megatron_opd.recipe.load import load_config
from megatron_opd.rollout.episodes import Episodes
from megatron_opd.rollout.vllm.engine import VllmEngine
from megatron_opd.runs import learner
from megatron_opd.tasks.tokenizer import load_tokenizer
from megatron_opd.teacher.privileged import PrivilegedTeacher
from megatron_opd.teacher.score import MegatronTeacher
from megatron_opd.trainer import checkpoint
from megatron_opd.trainer import step as train_step
from megatron_opd.verify.pool import VerifierPool

KILLED_AT = 1
step_now = -1


def die() -> None:
    if step_now == KILLED_AT:
        os.kill(os.getpid(), signal.SIGKILL)


def before(owner: Any, name: str, calls: int = 1) -> None:
    """Dies when `owner.name` is called for the `calls`-th time in the step."""
    original, count = getattr(owner, name), [0]

    def patched(*args: Any, **kwargs: Any) -> Any:
        count[0] += step_now == KILLED_AT
        if count[0] == calls:
            die()
        return original(*args, **kwargs)

    setattr(owner, name, patched)


def after(owner: Any, name: str) -> None:
    original = getattr(owner, name)

    def patched(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        die()
        return result

    setattr(owner, name, patched)


def in_generation(number: int, steps: int) -> None:
    """Before the `steps`-th step of the engine in the `number`-th generation of the step."""
    original, count = VllmEngine._run, [0]

    def patched(self: VllmEngine, *args: Any) -> Any:
        count[0] += step_now == KILLED_AT
        if count[0] == number:
            before(self._llm.llm_engine, "step", calls=steps)
        return original(self, *args)

    VllmEngine._run = patched  # type: ignore[method-assign]


def engine_fails() -> None:
    """In the middle of a generation; the process lives on."""
    original, calls = VllmEngine._run, iter(range(10**6))

    def patched(self: VllmEngine, *args: Any) -> Any:
        step = self._llm.llm_engine.step

        def failing() -> Any:
            if step_now == KILLED_AT and next(calls) == 3:
                raise MemoryError("no block left")
            return step()

        self._llm.llm_engine.step = failing
        return original(self, *args)

    VllmEngine._run = patched  # type: ignore[method-assign]


def in_the_stream_of_weights() -> None:
    original = learner.iter_hf_tensors

    def patched(*args: Any) -> Iterator[Any]:
        for i, item in enumerate(original(*args)):
            if i == 3:
                die()
            yield item

    learner.iter_hf_tensors = patched


PHASES: dict[str, Callable[[], None]] = {
    "generate": lambda: in_generation(1, steps=4),
    "score": lambda: before(VerifierPool, "score"),
    "teacher": lambda: before(MegatronTeacher, "_signals"),
    "forward": lambda: before(Objective, "__call__", calls=2),  # the second micro-batch
    "optimizer": lambda: after(train_step, "_apply"),
    "refit": in_the_stream_of_weights,
    "save": lambda: before(checkpoint, "write_manifest"),
    "publish": lambda: after(checkpoint, "write_manifest"),  # written whole, not yet renamed
    "evaluate": lambda: after(loop, "evaluations"),
    # of an agent: in the first cohort's second turn, between two turns, while environments work,
    # and before the student is asked as its own teacher
    "second_turn": lambda: in_generation(3, steps=2),
    "turn": lambda: before(Episodes, "_act", calls=9),
    "environment": lambda: before(EnvironmentPool, "ready", calls=3),
    "self_teacher": lambda: before(PrivilegedTeacher, "score"),
    "engine": engine_fails,
}


def train(config: RunConfig, *, phase: str | None = None, resume: bool = False) -> None:
    one_step = loop.one_step

    def watched(at: Any, book: Any, step: int) -> Any:
        global step_now
        step_now = step
        return one_step(at, book, step)

    loop.one_step = watched
    if phase:
        PHASES[phase]()
    loop.train(config, resume=resume)


def killed_and_resumed(config: RunConfig, phase: str) -> None:
    _, status = os.waitpid(fork(partial(train, config, phase=phase)), 0)
    ended = os.WTERMSIG(status)
    if ended:
        _, status = os.waitpid(fork(partial(train, config, resume=True)), 0)
    Path(f"{config.run_dir}.ended").write_text(f"{ended} {os.waitstatus_to_exitcode(status)}")


def fork(work: Callable[[], None]) -> int:
    """The id of a process that does `work`."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            try:
                work()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
        os._exit(1)
    return pid


def main(out: Path, phases: Sequence[str], recipe: str, *overrides: str) -> None:
    config = load_config(recipe, list(overrides))
    load_tokenizer(config.student.path)
    works = [partial(train, replace(config, run_dir=str(out / "whole")))]
    works += [
        partial(killed_and_resumed, replace(config, run_dir=str(out / phase)), phase)
        for phase in phases
    ]
    running = 0
    for work in works:
        if running == len(os.sched_getaffinity(0)):
            os.wait()
            running -= 1
        fork(work)
        running += 1
    for _ in range(running):
        os.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2].split(","), *sys.argv[3:])
