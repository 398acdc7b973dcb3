"""Environments in real worker processes: hangs, deaths, strange answers, replays, interpreters."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from megatron_opd.contracts.environments import Observation
from megatron_opd.environments.open import open_environments
from megatron_opd.environments.pool import EnvironmentPool
from megatron_opd.errors import RunError
from megatron_opd.recipe.agents import EnvironmentConfig

OWN = '''
import os
import random
import sys
import time

print("printed at import")


class Counter:
    """Says how many steps it has taken, and does what the action says."""

    def __init__(self, start=0, broken=False):
        if broken:
            raise RuntimeError("it is\\nbroken")
        self.start = start

    def task_ids(self, split):
        return {"train": ["a", "b"], "odd": "text"}[split]

    def reset(self, *, seed, options):
        if options["task_id"] == "cannot":
            raise KeyError(options["task_id"])
        self.count = self.start
        self.draw = random.Random(seed)
        return f"begun {options['task_id']}", {"task": "count", "task_type": "counting"}

    def step(self, action):
        print("stdout", action)
        sys.stdin.read()
        self.count += 1
        text, info = f"{self.count} {self.draw.random():.3f}", {}
        if action == "hang":
            time.sleep(60)
        if action == "die":
            os._exit(7)
        if action == "exit":
            sys.exit("enough")
        if action == "raise":
            raise ValueError("no\\nsuch action")
        if action == "write":
            for descriptor in range(3, 20):
                try:
                    os.write(descriptor, b"garbage\\n")
                except OSError:
                    pass
        if action == "clock":
            text = str(time.perf_counter())
        answers = {
            "number": (3, 0.0, False, False, info),
            "four": (text, 0.0, False, info),
            "reward": (text, "much", False, False, info),
            "nan": (text, float("nan"), False, False, info),
            "flag": (text, 0.0, "no", False, info),
            "info": (text, 0.0, False, False, []),
            "admissible": (text, 0.0, False, False, {"admissible": "go"}),
            "score": (text, 0.0, False, False, {"score": 7}),
            "surrogate": ("\\ud800!", 0.0, False, False, info),
            "win": (text, 1, True, False, {"won": True, "admissible": []}),
            "time": (text, 0.0, False, True, {"score": 0.5, "valid": False}),
        }
        return answers.get(action, (text, 0.5, False, False, info))


NOT_A_CLASS = 3
'''
LIMITS = {"reset_seconds": 5.0, "step_seconds": 0.3}


@pytest.fixture
def here(own_module: Callable[[str, str], Path]) -> Path:
    return own_module("own_environment", OWN)


@pytest.fixture
def opened(here: Path) -> Iterator[Callable[..., EnvironmentPool]]:
    with ExitStack() as closing:

        def open_it(kind: str = "own_environment:Counter", **keys: object) -> EnvironmentPool:
            config = replace(EnvironmentConfig(kind, **LIMITS), **keys)
            return open_environments(config, closing)

        yield open_it


def wait(pool: EnvironmentPool, count: int = 1) -> dict[int, Observation]:
    answers: dict[int, Observation] = {}
    while len(answers) < count:
        arrived = pool.ready(20.0)
        assert arrived, "no answer"
        answers.update(arrived)
    return answers


def begin(pool: EnvironmentPool, *slots: int) -> None:
    for slot in slots:
        pool.reset(slot, f"task{slot}", seed=slot)
    assert not any(seen.failed for seen in wait(pool, len(slots)).values())


def step(pool: EnvironmentPool, slot: int, action: str) -> Observation:
    pool.step(slot, action)
    return wait(pool)[slot]


def test_an_episode_says_what_its_environment_says(opened: Callable[..., EnvironmentPool]) -> None:
    pool = opened(options={"start": 10})
    pool.reset(4, "first", seed=1)
    assert wait(pool)[4] == Observation("begun first", task="count", task_type="counting")
    seen = step(pool, 4, "go")
    assert seen == Observation("11 0.134", reward=0.5, task="count", task_type="counting")
    assert step(pool, 4, "surrogate").text == "?!"
    won = step(pool, 4, "win")
    assert won.won and won.terminated and won.score == 1.0 and won.reward == 1.0
    assert won.admissible == () and won.task == "count" and won.ended
    begin(pool, 4)
    cut = step(pool, 4, "time")
    assert cut.truncated and not cut.terminated and not cut.valid and cut.score == 0.5
    assert pool.task_ids("train") == ["a", "b"]
    assert pool.rates()["step"][0] == 4 and pool.memory_bytes()[0] > 1e6


WRONG_ANSWERS = [
    ("raise", "step: ValueError: no such action"),
    ("exit", "step: SystemExit: enough"),
    ("number", "step: observation is of type int, must be text"),
    (
        "four",
        "step: step returned a tuple of 4, must be (observation, reward, terminated, "
        "truncated, info)",
    ),
    ("reward", "step: reward is of type str, must be a number"),
    ("nan", "step: reward is nan, must be finite"),
    ("flag", "step: terminated is of type str, must be true or false"),
    ("info", "step: info is of type list, must be a dict"),
    ("admissible", "step: info admissible is of type str, must be a list of texts"),
    ("score", "step: info score is 7, must be from 0 to 1"),
]


def test_a_wrong_answer_fails_its_episode_alone(opened: Callable[..., EnvironmentPool]) -> None:
    pool = opened()
    begin(pool, 1)
    worker = pool._lanes[0].worker
    process = worker.process
    for count, (action, reason) in enumerate(WRONG_ANSWERS, start=1):
        begin(pool, 0)  # the slot serves again
        assert step(pool, 0, action) == Observation("", failed=reason)
        assert step(pool, 1, "go").text.startswith(f"{count} ")
    assert worker.process is process  # nothing was killed


@pytest.mark.parametrize(
    ("action", "reason"),
    [
        ("hang", "step took longer than 0.3 s"),
        ("die", "its process ended during step (stdout die)"),
        ("write", "its process answered b'garbage'"),
    ],
)
def test_a_lost_process_fails_one_episode_and_plays_the_others_again(
    opened: Callable[..., EnvironmentPool], action: str, reason: str
) -> None:
    pool = opened()
    begin(pool, 0, 1, 2)
    before = step(pool, 1, "go")
    pool.step(0, action)
    pool.step(1, "go")  # waits behind it
    answers = wait(pool, 2)
    assert answers[0].failed.startswith(reason)
    assert not answers[1].failed
    undisturbed = opened()  # the same seed and actions in a process that nobody killed
    begin(undisturbed, 1)
    assert step(undisturbed, 1, "go") == before
    assert step(undisturbed, 1, "go") == answers[1]
    assert step(pool, 2, "go").text.startswith("1 ")
    begin(pool, 0)


def test_a_process_that_ends_between_two_calls_fails_nobody(
    opened: Callable[..., EnvironmentPool],
) -> None:
    pool = opened()
    begin(pool, 0)
    process = pool._lanes[0].worker.process
    assert process is not None
    process.kill()
    process.wait()
    assert step(pool, 0, "go").text.startswith("1 ")


def test_what_cannot_be_played_again_fails(opened: Callable[..., EnvironmentPool]) -> None:
    pool = opened()
    begin(pool, 0, 1)
    step(pool, 1, "clock")
    step(pool, 0, "die")
    assert step(pool, 1, "go").failed.startswith("is not deterministic")


def test_slots_do_not_wait_for_a_slow_one(opened: Callable[..., EnvironmentPool]) -> None:
    pool = opened(workers=2, step_seconds=60.0)
    begin(pool, 0, 1)
    pool.step(0, "hang")
    for _ in range(5):
        assert step(pool, 1, "go").text
    assert pool.ready(0.0) == []


def test_a_reset_that_fails_leaves_the_slot_usable(opened: Callable[..., EnvironmentPool]) -> None:
    pool = opened()
    pool.reset(0, "cannot", seed=0)
    assert wait(pool)[0].failed == "reset: KeyError: 'cannot'"
    begin(pool, 0)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"options": {"broken": True}}, "RuntimeError: it is broken"),
        ({"options": {"begin": 3}}, "unexpected keyword argument 'begin'"),
        ({"kind": "own_environment:Nobody"}, "own_environment has no Nobody"),
        ({"kind": "nowhere:Nobody"}, "nowhere cannot be imported"),
        ({"kind": "own_environment:NOT_A_CLASS"}, "of type int, must be a class"),
        ({"kind": "Nobody-v0"}, "Nobody"),
        ({"python": "/no/such/python"}, "/no/such/python: No such file or directory"),
    ],
)
def test_an_environment_that_cannot_be_made_is_one_line(
    opened: Callable[..., EnvironmentPool], keys: dict[str, object], message: str
) -> None:
    pool = opened(**keys)
    pool.reset(0, "a", seed=0)
    with pytest.raises(RunError, match=message) as caught:
        wait(pool)
    assert "\n" not in str(caught.value)
    with pytest.raises(RunError, match=message):
        pool.task_ids("train")


@pytest.mark.parametrize(
    ("split", "message"), [("none", "KeyError: 'none'"), ("odd", "must be a list of texts")]
)
def test_a_split_without_tasks_is_one_line(
    opened: Callable[..., EnvironmentPool], split: str, message: str
) -> None:
    with pytest.raises(RunError, match=message):
        opened().task_ids(split)


def test_another_interpreter_needs_no_packages(
    opened: Callable[..., EnvironmentPool], tmp_path: Path
) -> None:
    """One without site-packages: the worker imports the standard library and little of ours."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    python = str(tmp_path / "bare" / "bin" / "python")
    assert subprocess.run([python, "-c", "import numpy"], capture_output=True).returncode == 1
    pool = opened(python=python)
    begin(pool, 0)
    assert step(pool, 0, "go").text.startswith("1 ")
    process = pool._lanes[0].worker.process
    assert process is not None and process.args[0] == python


def test_closing_ends_a_hanging_process_at_once(opened: Callable[..., EnvironmentPool]) -> None:
    pool = opened(step_seconds=60.0)
    begin(pool, 0)
    process = pool._lanes[0].worker.process
    assert process is not None
    pool.step(0, "hang")
    began = time.monotonic()
    pool.close()
    assert time.monotonic() - began < 2.0 and process.poll() is not None
    pool.close()


def test_a_worker_ends_with_the_process_that_started_it(here: Path) -> None:
    code = (
        "import contextlib, os\n"
        "from megatron_opd.environments.open import open_environments\n"
        "from megatron_opd.recipe.agents import EnvironmentConfig\n"
        "config = EnvironmentConfig('own_environment:Counter')\n"
        "pool = open_environments(config, contextlib.ExitStack())\n"
        "pool.reset(0, 'a', 0)\n"
        "pool.ready(20)\n"
        "pool.step(0, 'hang')\n"
        "print(pool._lanes[0].worker.process.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    pid = int(done.stdout)
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the worker outlived its parent"
        time.sleep(0.02)


GYMNASIUM = """
import gymnasium


class Echo(gymnasium.Env):
    observation_space = gymnasium.spaces.Text(10)
    action_space = gymnasium.spaces.Text(10)

    def __init__(self, word="yes"):
        self.word = word

    def task_ids(self, split):
        return ["one"]

    def reset(self, *, seed=None, options=None):
        return options["task_id"] + "\\u00e9", {}

    def step(self, action):
        return self.word + action, 1.0, True, False, {"won": True}


gymnasium.register("Echo-v0", entry_point=Echo)
"""


def test_a_gymnasium_id_is_an_environment(
    opened: Callable[..., EnvironmentPool], here: Path
) -> None:
    pytest.importorskip("gymnasium", reason="gymnasium is not installed: the extra `agents`")
    (here / "own_gym.py").write_text(GYMNASIUM)
    pool = opened("own_gym:Echo-v0", options={"word": "no"})
    assert pool.task_ids("train") == ["one"]
    pool.reset(0, "one", seed=3)
    assert wait(pool)[0].text == "one\u00e9"
    seen = step(pool, 0, "!")
    assert (seen.text, seen.reward, seen.won, seen.terminated) == ("no!", 1.0, True, True)
