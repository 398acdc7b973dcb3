"""Rewards, with real worker processes."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opd.config.schema import RewardConfig
from megatron_opd.errors import RunError
from megatron_opd.records import Prompt, Rollout
from megatron_opd.reward.answer import boxed, compare_plain_integers, final_answer
from megatron_opd.reward.math import judge
from megatron_opd.reward.pool import RewardPool

LIMIT_SECONDS = 2.0
HANGS = r"\boxed{9^{9^{9^{9}}}}"

HOSTILE = [
    "",
    " \n\t",
    r"\boxed{}",
    r"\boxed{1",
    r"\boxed{" * 3000,
    r"\boxed{" + "{" * 3000 + "2" + "}" * 3000 + "}",
    r"\boxed{" + "9" * 10**6 + "}",
    r"\boxed{" + "9" * 10_000 + "}",
    r"\boxed{(x+y+z+w)^{300}}",
    "\\boxed{\x00\x00}",
    "\ud800 \\boxed{\u202e\u0661\ufffd}",
    r"\boxed{\frac{1}{0}}",
    r"\boxed{__import__('os').kill(0, 9)}",
    "answer: __import__('os')._exit(0)",
    '\\boxed{\n"]\n[]}',
    "$" * 20_000,
    "(" * 20_000,
    HANGS,
]


def rollout(text: str, gold: str) -> Rollout:
    none = np.zeros(0, np.int32)
    prompt = Prompt(index=0, problem="", answer=gold, text="", token_ids=none)
    return Rollout(prompt, 0, none, np.zeros(0, np.float32), text, "stop", 0)


def process_of(pool: RewardPool) -> int:
    process = pool._workers[0].process
    assert process is not None
    return process.pid


def evaluator_of(pool: RewardPool) -> int:
    """The child that the worker forked, once there is one."""
    pid = process_of(pool)
    children = Path(f"/proc/{pid}/task/{pid}/children")
    wait_until(lambda: children.read_text().split())
    return int(children.read_text().split()[0])


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def is_group_gone(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, 0)
        return False
    return True


@pytest.fixture(scope="module")
def pool() -> Iterator[RewardPool]:
    with RewardPool(RewardConfig(timeout_seconds=LIMIT_SECONDS)) as pool:
        pool.warm_up()
        yield pool


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{42}.", r"\boxed{42}"),
        (r"\boxed{1} no, \boxed{2}", r"\boxed{2}"),
        (r"\boxed { \frac{1}{2} }", r"\boxed{\frac{1}{2}}"),
        (r"\fbox{7}", r"\boxed{7}"),
        (r"\boxed{\{1, 2\}} and {", r"\boxed{\{1, 2\}}"),
        (r"\boxed{\left\{1\right.}", r"\boxed{\left\{1\right.}"),
        (r"\boxed{1} then \boxed{\frac{1}{2}", None),
        (r"7 \boxed{}", None),
        ("the answer is 7 ", "the answer is 7"),
        ("x" * 5000 + " 12", ("x" * 5000 + " 12")[-1000:]),
        ("  ", None),
    ],
)
def test_final_answer_is_the_last_box_or_the_tail(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


def test_rewards_reasons_and_order(pool: RewardPool) -> None:
    cases = [
        (r"so \boxed{42}", "42", "correct"),
        (r"so \boxed{41}", "42", "wrong"),
        (r"\boxed{\frac{1}{2}}", "0.5", "correct"),
        (r"\boxed{1/2}", r"$\frac{1}{2}$", "correct"),
        (r"\boxed{2x + 1}", r"1 + 2x", "correct"),
        (r"\boxed{\{2, 1\}}", r"\{1,2\}", "correct"),
        (r"\boxed{\text{A}}", "A", "correct"),
        (r"\boxed{1{,}000}", "1000", "correct"),
        ("Answer: 34", "34", "correct"),
        ("the final answer is $x^2$.", "x^2", "correct"),
        (r"\boxed{3} \boxed{4}", r"\boxed{3}", "wrong"),
        ("I do not know", "3", "no_answer"),
        (r"\boxed{", "3", "no_answer"),
        (r"\boxed{\frac{1}{3}}", " ", "bad_gold"),
        (r"\boxed{" + "1" * 30_000 + "}", "3", "too_long"),
    ]
    scored = pool.score([rollout(text, gold) for text, gold, _ in cases])
    assert [r.text for r in scored] == [text for text, _, _ in cases]
    assert [r.reward_reason for r in scored] == [reason for _, _, reason in cases]
    assert [r.reward for r in scored] == [float(reason == "correct") for _, _, reason in cases]
    assert pool.score([]) == []


def test_hostile_answers_score_zero_within_the_limits(pool: RewardPool) -> None:
    pool.score([rollout(r"\boxed{x}", "x")])  # the worker is up
    worker, start = process_of(pool), time.monotonic()
    scored = pool.score([rollout(text, r"\frac{1}{2}") for text in HOSTILE] + [rollout(r"\boxed{0.5}", r"\frac{1}{2}")])
    assert time.monotonic() - start < len(scored) * (LIMIT_SECONDS + 1)
    assert [r.reward for r in scored] == [0.0] * len(HOSTILE) + [1.0]
    reasons = {r.reward_reason for r in scored[:-1]}
    assert reasons <= {"wrong", "no_answer", "too_long", "timeout", "crashed", "error"}
    assert scored[HOSTILE.index(HANGS)].reward_reason == "timeout"
    assert process_of(pool) == worker, "a hung answer must not cost a new worker"


def test_equal_answers_are_evaluated_once(pool: RewardPool) -> None:
    copies = 30
    start = time.monotonic()
    scored = pool.score([rollout(f"attempt {i}: {HANGS}", r"\sqrt{2}") for i in range(copies)])
    assert {r.reward_reason for r in scored} == {"timeout"}
    assert time.monotonic() - start < copies * LIMIT_SECONDS / 2


def test_the_worker_loads_neither_torch_nor_numpy(pool: RewardPool) -> None:
    pool.score([rollout(r"\boxed{x}", "x")])
    for pid in (process_of(pool), evaluator_of(pool)):
        libraries = Path(f"/proc/{pid}/maps").read_text()
        assert "python" in libraries
        assert not [name for name in ("torch", "numpy", "megatron/", "vllm") if f"site-packages/{name}" in libraries]


@pytest.mark.parametrize("victim", [process_of, evaluator_of])
def test_a_killed_process_is_replaced_and_no_answer_is_lost(
    pool: RewardPool, victim: Callable[[RewardPool], int]
) -> None:
    pool.score([rollout(r"\boxed{x}", "x")])
    rollouts = [rollout(rf"\boxed{{\frac{{{i}}}{{7}}}}", rf"\frac{{{i - i % 2}}}{{7}}") for i in range(100, 200)]
    result: list[Rollout] = []
    scoring = threading.Thread(target=lambda: result.extend(pool.score(rollouts)))
    pid = victim(pool)
    scoring.start()
    time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    scoring.join()
    assert [r.reward_reason for r in result] == ["correct", "wrong"] * 50
    assert victim(pool) != pid


def test_an_evaluator_killed_while_idle_is_replaced(pool: RewardPool) -> None:
    pool.score([rollout(r"\boxed{x}", "x")])
    os.kill(evaluator_of(pool), signal.SIGKILL)
    assert pool.score([rollout(r"\boxed{\pi}", r"\pi")])[0].reward_reason == "correct"


def test_several_workers_keep_the_order_and_close_ends_them_in_mid_answer() -> None:
    pool = RewardPool(RewardConfig(timeout_seconds=60, workers=2))
    scored = pool.score([rollout(rf"\boxed{{{i}.5}}", rf"\frac{{{2 * i + i % 2}}}{{2}}") for i in range(20)])
    assert [r.reward_reason for r in scored] == ["wrong", "correct"] * 10
    groups = [worker.process.pid for worker in pool._workers if worker.process]
    scoring = threading.Thread(target=lambda: pool.score([rollout(HANGS, "x"), rollout(HANGS, "y")]))
    scoring.start()
    time.sleep(0.3)
    pool.close()
    scoring.join(10)
    assert not scoring.is_alive()
    assert len(groups) == 2
    wait_until(lambda: all(map(is_group_gone, groups)))  # init collects the evaluators
    pool.close()


def test_workers_end_with_a_killed_trainer_and_do_not_run_its_script(tmp_path: Path) -> None:
    script = tmp_path / "trainer.py"  # without a __main__ guard
    script.write_text(
        "import time\n"
        "from megatron_opd.config.schema import RewardConfig\n"
        "from megatron_opd.reward.pool import RewardPool\n"
        "pool = RewardPool(RewardConfig())\n"
        "pool.warm_up()\n"
        "print(pool._workers[0].process.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, env=environment, cwd=tmp_path) as trainer:
        assert trainer.stdout is not None
        group = int(trainer.stdout.readline())
        assert not is_group_gone(group)
        trainer.kill()
        assert trainer.stdout.read() == b""
    wait_until(lambda: is_group_gone(group))


def test_a_worker_that_cannot_start_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with RewardPool(RewardConfig()) as pool, pytest.raises(RunError, match="reward worker did not start"):
        pool.score([rollout(r"\boxed{x}", "x")])


integers = st.integers(-(10**13), 10**13) | st.integers(-120, 120)


@settings(max_examples=150, deadline=None)
@given(integers, integers | st.sampled_from([-1, 0, 1]), st.sampled_from(["", "0", " ", "-", "+", "%"]))
def test_integers_are_compared_as_math_verify_does(gold: int, offset: int, prefix: str) -> None:
    for content in (str(gold), str(gold + offset), str(-gold), f"{prefix}{gold}"):
        reason = compare_plain_integers(boxed(content), str(gold))
        assert reason is None or reason == judge(boxed(content), str(gold))
    if abs(gold) < 10**12:
        assert compare_plain_integers(boxed(str(gold)), str(gold)) == "correct"
