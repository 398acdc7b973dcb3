"""When the engine gives up the device's memory, and that one which failed does: what happens on
CUDA alone.

vLLM sleeps on CUDA alone, so that a stand-in takes its place here; the engine, the run and the step
are the real ones.
"""

import gc
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_opd import loop
from megatron_opd.contracts.sampling import Draw, Request, Sampling
from megatron_opd.contracts.signals import Signals
from megatron_opd.contracts.stations import RefitReport
from megatron_opd.errors import RunError
from megatron_opd.rollout.restart import Restarting
from megatron_opd.rollout.vllm.engine import VllmEngine
from megatron_opd.world import processes
from tests.rows import task

REQUEST = Request(task(), np.array([1], np.int32), 4, seed=0)


class StandIn:
    """What a sleeping vLLM is asked; `fails`: the call that finds no memory."""

    def __init__(self, fails: str = "") -> None:
        self.fails = fails
        self.calls: list[str] = []
        self.itself: StandIn | None = None

    def _called(self, name: str) -> None:
        self.calls.append(name)
        if name == self.fails:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def sleep(self, level: int) -> None:
        self._called("sleep")

    def wake_up(self) -> None:
        self._called("wake_up")

    def reset_prefix_cache(self) -> bool:
        self._called("generate")
        return False


def asleep(llm: StandIn) -> VllmEngine:
    engine = object.__new__(VllmEngine)
    vars(engine).update(
        _llm=llm,
        _sleeps=True,
        _asleep=True,
        _ends=[2],
        device=torch.device("cuda"),
        policy_version=0,
    )
    return engine


def complete(engine: VllmEngine) -> Any:
    return engine.complete([REQUEST], Sampling(version=0, temperature=1.0))


@pytest.fixture
def world() -> Iterator[None]:
    processes.start()
    yield
    processes.stop()


def test_no_memory_to_wake_up_in_is_a_failure_of_the_engine() -> None:
    with pytest.raises(RunError, match=r"vLLM failed while generating.*out of memory"):
        complete(asleep(StandIn(fails="wake_up")))


def test_an_engine_that_fails_to_sample_sleeps_again() -> None:
    engine = asleep(llm := StandIn(fails="generate"))
    with pytest.raises(RunError, match="out of memory"):
        complete(engine)
    assert llm.calls == ["wake_up", "generate", "sleep"]
    engine.sleep()  # it does already
    assert llm.calls[-2:] == ["generate", "sleep"]


@pytest.mark.parametrize("call", ["wake_up", "generate"])
def test_an_engine_that_failed_is_gone_before_the_next_one_starts(
    world: None, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Nothing holds it: not the engine, not the error that is reported, whose traceback goes
    through it."""
    engine = asleep(StandIn(fails=call))
    failed = weakref.ref(engine._llm)
    # vLLM's objects hold each other, and are frozen once it has started
    engine._llm.itself = engine._llm
    gc.freeze()
    alive: list[bool] = []
    monkeypatch.setattr(engine, "_start", lambda: alive.append(failed() is not None))
    done: list[object] = []

    class Sampler:
        def sample(self, tasks: object, draw: object) -> Any:
            return complete(engine) if not alive else "samples"

    def restart(version: int, reason: str) -> None:
        done.append((version, "out of memory" in reason))
        engine.restart()

    draw = Draw(seed=0, step=3, version=3, samples=1, max_tokens=4, temperature=1.0)
    assert Restarting(Sampler(), restart).sample([], draw) == "samples"
    assert alive == [False] and done == [(3, True)]
    with pytest.raises(RunError, match="out of memory"):  # with two engines in a process
        Restarting(SimpleNamespace(sample=lambda *_: complete(asleep(StandIn(call)))), None).sample(
            [], draw
        )


@pytest.mark.parametrize("awake", [True, False])
def test_the_engine_sleeps_while_models_work_also_in_a_step_without_samples(
    awake: bool,
) -> None:
    """GKD's step on traces finds it awake: the refit of the step before has woken it."""
    engine = asleep(StandIn())
    engine._asleep = not awake
    seen: list[bool] = []

    def work(*arguments: object, **settings: object) -> Any:
        seen.append(engine._asleep)
        return Signals(None) if len(seen) == 1 else []

    class Refitted(Exception):
        pass

    def send(version: int) -> RefitReport:
        raise Refitted

    learner: Any = SimpleNamespace(
        config=None,
        needs=SimpleNamespace(student_pass=False, rollouts=True),
        judges=SimpleNamespace(signals=work, process=None),
        trainer=SimpleNamespace(step=work),
        copy=None,
    )
    stations: Any = SimpleNamespace(
        config=SimpleNamespace(num_steps=1),
        engine=engine,
        heldout=(),
        suites=(),
        learner=learner,
        needs=learner.needs,
        rows=lambda step, clock, note: [],
        sender=SimpleNamespace(send=send),
    )
    with pytest.raises(Refitted):
        loop.one_step(stations, SimpleNamespace(note=None), 0)
    assert seen == [True, True]
