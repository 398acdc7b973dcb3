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

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opd.contracts.rows import Row
from megatron_opd.errors import RunError
from megatron_opd.recipe.rewards import RewardConfig
from megatron_opd.verify import pool as pool_module
from megatron_opd.verify.answer import boxed, final_answer, read_gold
from megatron_opd.verify.math import grade, math_verdict
from megatron_opd.verify.plain import compare_plain
from megatron_opd.verify.pool import VerifierPool
from tests.rows import row, task
from tests.unit.reward_pairs import PAIRS

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


def answer(text: str, gold: str, finish_reason: str = "stop") -> Row:
    return row([], of=task(answer=gold), text=text, finish_reason=finish_reason)


def process_of(pool: VerifierPool) -> int:
    process = pool._workers[0].process
    assert process is not None
    return process.pid


def evaluator_of(pool: VerifierPool) -> int:
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
def pool() -> Iterator[VerifierPool]:
    with VerifierPool(RewardConfig(timeout_seconds=LIMIT_SECONDS)) as pool:
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
        (r"\boxed 5$.", r"\boxed{5}"),
        (r"\boxed{\boxed{5}}", r"\boxed{5}"),
        (r"x=\boxed{3} and y=\boxed{4}", r"\boxed{3, 4}"),
        (r"$x=\boxed{3}$ or $x=\boxed{4}$", r"\boxed{3, 4}"),
        (r"\boxed{1}, \boxed{2}, and \boxed{3}", r"\boxed{1, 2, 3}"),
        (r"\boxed{6}, \boxed{6}", r"\boxed{6}"),
        (r"\boxed{1} or \boxed{", None),
        ("<answer>34</answer>", r"\boxed{34}"),
        ("<think>7</think> <answer> The answer is $8$. </answer>", r"\boxed{8}"),
        (r"<answer>so \boxed{5}</answer>", r"\boxed{5}"),
        (r"<answer>4</answer> or rather \boxed{5}", r"\boxed{5}"),
        (r"\boxed{4} <answer>5</answer>", r"\boxed{5}"),
        ("<answer></answer>", None),
        ("<answer>34", None),
        ("the answer is 7", None),
        ("", None),
    ],
)
@pytest.mark.parametrize("truncated", [False, True])
def test_final_answer_is_the_last_box(text: str, answer: str | None, truncated: bool) -> None:
    assert final_answer(text, truncated=truncated) == answer
    if answer or "boxed" in text:
        assert final_answer(text, "boxed_or_last", truncated=truncated) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("the answer is 7 ", "the answer is 7"),
        ("x" * 5000 + " 12", ("x" * 5000 + " 12")[-1000:]),
        ("it may be 6</think>7", "7"),
        ("it may be 6</think>", None),
        ("  ", None),
    ],
)
def test_without_a_box_the_end_may_be_the_answer_unless_it_was_cut_off(
    text: str, answer: str | None
) -> None:
    assert final_answer(text, "boxed_or_last") == answer
    assert final_answer(text, "boxed_or_last", truncated=True) is None
    assert final_answer(text) is None


@pytest.mark.parametrize(
    ("gold", "content"),
    [
        ("5", "5"),
        ("5.", "5"),
        ("**5**", "5"),
        ("$5$", "5"),
        (r"$\boxed{5}$", "5"),
        (r"so \boxed{3}, \boxed{4}", "3, 4"),
        ("<answer>5</answer>", "5"),
        ("The answer is 5", "5"),
        (r"The final answer is: $\frac{1}{2}$.", r"\frac{1}{2}"),
        ("48/2 = 24 clips in May. 48+24 = 72 #### 72", "72"),
        ("There are 12 apples.", "12"),
        ("12 square metres", "12"),
        ("5 percent", "5 percent"),
        ("The area is $x^2$ here", "x^2"),
        ("x = 3 or x = 4", "x = 3 or x = 4"),
        ("no solution", "no solution"),
        (r"\left(0, 1\right.", r"\left(0, 1\right."),
        (r"\text{all real numbers except } 3", r"\text{all real numbers except } 3"),
        ("less than 7", None),
        ("all real numbers except 3", None),
        ("5 apples and 3 oranges", None),
        ("5 million", None),
        (r"\frac{1}{2", None),
        ("2}", None),
        ("**", None),
        ("I add 2 and 3 and get 5, because " * 20, None),
    ],
)
def test_a_gold_answer_is_read_or_refused(gold: str, content: str | None) -> None:
    assert read_gold(gold) == content


def test_rewards_reasons_and_order(pool: VerifierPool) -> None:
    cases = [
        (r"so \boxed{42}", "42", "correct"),
        (r"so \boxed{41}", "42", "wrong"),
        (r"\boxed{\frac{1}{2}}", "0.5", "correct"),
        (r"\boxed{1/2}", r"$\frac{1}{2}$", "correct"),
        (r"\boxed{2x + 1}", r"1 + 2x", "correct"),
        (r"\boxed{\{2, 1\}}", r"\{1,2\}", "correct"),
        (r"\boxed{\text{A}}", "A", "correct"),
        (r"\boxed{1{,}000}", "1000", "correct"),
        ("Answer: 34", "34", "no_answer"),
        (r"\boxed{3} \boxed{4}", r"\boxed{3}", "wrong"),
        ("I do not know", "3", "no_answer"),
        (r"\boxed{", "3", "no_answer"),
        (r"\boxed{\frac{1}{3}}", " ", "bad_gold"),
        (r"\boxed{" + "1" * 30_000 + "}", "3", "too_long"),
    ]
    scored = pool.score([answer(text, gold) for text, gold, _ in cases])
    assert [r.text for r in scored] == [text for text, _, _ in cases]
    assert [r.verdict.reason for r in scored] == [reason for _, _, reason in cases]
    assert [r.reward for r in scored] == [float(reason == "correct") for _, _, reason in cases]
    assert [r.verdict.score for r in scored] == [r.reward for r in scored]
    judged = {"correct": True, "bad_gold": None}
    assert [r.verdict.correct for r in scored] == [judged.get(c[2], False) for c in cases]
    assert pool.score([]) == []


@pytest.mark.parametrize("kind", PAIRS)
def test_pairs_of_answer_and_gold(kind: str) -> None:
    for content, gold_text, is_right in PAIRS[kind]:
        gold, answer = read_gold(gold_text), final_answer(boxed(content))
        assert gold is not None and answer is not None, gold_text
        assert (grade(answer, gold) == "correct") == is_right, (content, gold_text)


def test_a_completion_that_was_cut_off_has_no_answer_without_a_box() -> None:
    for mode in ("boxed", "boxed_or_last"):
        with VerifierPool(RewardConfig(answer=mode)) as pool:
            cut = [
                answer(text, "5", "length")
                for text in (r"so 3 + 2 = 5", r"\boxed{5} and so on", r"so \boxed{5")
            ]
            assert [r.verdict.reason for r in pool.score(cut)] == [
                "truncated",
                "correct",
                "truncated",
            ]
            ended = pool.score([answer("so it is 5", "5")])[0].verdict.reason
            assert ended == {"boxed": "no_answer", "boxed_or_last": "correct"}[mode]


def test_golds_that_nothing_can_match_are_named(pool: VerifierPool) -> None:
    golds = ["less than 7", r"\frac{1}{2", "5 apples and 3 oranges", r"\sqrt[", "x^^2"]
    assert [pool.score([answer(r"\boxed{2x}", gold)])[0].verdict.reason for gold in golds] == [
        "bad_gold"
    ] * len(golds)


def test_many_hostile_answers_stay_within_the_budget(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """6 of them would take 30 s of processor time; the honest ones among them keep their
    rewards."""
    monkeypatch.setattr(pool_module, "LEAST_SECONDS", 0.5)  # machines that test are busy
    pairs: list[tuple[str, str]] = []
    for i in range(2, 8):
        pairs += [(rf"\boxed{{{i}^{{9^{{9^{{9}}}}}}}}", r"\sqrt{2}"), (rf"\boxed{{{i}x}}", f"{i}x")]
    with VerifierPool(RewardConfig(timeout_seconds=5, budget_seconds=1)) as pool:
        pool.score([answer(r"\boxed{2x}", "2x")])  # the worker is up
        before = time.monotonic()
        scored = pool.score([answer(text, gold) for text, gold in pairs])
        assert time.monotonic() - before < 60  # 2 to 4 s on an idle machine
    assert [r.verdict.reason for r in scored] == ["over_budget", "correct"] * 6
    assert "6 answers were not judged within reward.budget_seconds=1 and score 0" in caplog.text


def test_hostile_answers_score_zero_within_the_limits(pool: VerifierPool) -> None:
    pool.score([answer(r"\boxed{2x}", "2x")])  # the worker is up
    worker, start = process_of(pool), time.monotonic()
    scored = pool.score(
        [answer(text, r"\frac{1}{2}") for text in HOSTILE]
        + [answer(r"\boxed{0.5}", r"\frac{1}{2}")]
    )
    assert time.monotonic() - start < len(scored) * (LIMIT_SECONDS + 1)
    assert [r.reward for r in scored] == [0.0] * len(HOSTILE) + [1.0]
    reasons = {r.verdict.reason for r in scored[:-1]}
    assert reasons <= {"wrong", "no_answer", "too_long", "timeout", "crashed", "error"}
    assert scored[HOSTILE.index(HANGS)].verdict.reason == "timeout"
    assert process_of(pool) == worker, "a hung answer must not cost a new worker"


def test_equal_answers_are_evaluated_once(pool: VerifierPool) -> None:
    copies = 30
    start = time.monotonic()
    scored = pool.score([answer(f"attempt {i}: {HANGS}", r"\sqrt{2}") for i in range(copies)])
    assert {r.verdict.reason for r in scored} == {"timeout"}
    assert time.monotonic() - start < copies * LIMIT_SECONDS / 2


def test_the_worker_loads_neither_torch_nor_numpy(pool: VerifierPool) -> None:
    pool.score([answer(r"\boxed{2x}", "2x")])
    for pid in (process_of(pool), evaluator_of(pool)):
        libraries = Path(f"/proc/{pid}/maps").read_text()
        assert "python" in libraries
        assert not [
            name
            for name in ("torch", "numpy", "megatron/", "vllm")
            if f"site-packages/{name}" in libraries
        ]


@pytest.mark.parametrize("victim", [process_of, evaluator_of])
def test_a_killed_process_is_replaced_and_no_answer_is_lost(
    pool: VerifierPool, victim: Callable[[VerifierPool], int]
) -> None:
    pool.score([answer(r"\boxed{2x}", "2x")])
    rows = [answer(rf"\boxed{{{i}x}}", f"{i - i % 2}x") for i in range(100, 200)]
    result: list[Row] = []
    scoring = threading.Thread(target=lambda: result.extend(pool.score(rows)))
    pid = victim(pool)
    scoring.start()
    time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    scoring.join()
    assert [r.verdict.reason for r in result] == ["correct", "wrong"] * 50
    assert victim(pool) != pid


def test_an_evaluator_killed_while_idle_is_replaced(pool: VerifierPool) -> None:
    pool.score([answer(r"\boxed{2x}", "2x")])
    os.kill(evaluator_of(pool), signal.SIGKILL)
    assert pool.score([answer(r"\boxed{2\pi}", r"2\pi")])[0].verdict.reason == "correct"


def test_several_workers_keep_the_order_and_close_ends_them_in_mid_answer() -> None:
    pool = VerifierPool(RewardConfig(timeout_seconds=60, workers=2))
    scored = pool.score(
        [answer(rf"\boxed{{{i}.5x}}", rf"\frac{{{2 * i + i % 2}}}{{2}}x") for i in range(20)]
    )
    assert [r.verdict.reason for r in scored] == ["wrong", "correct"] * 10
    groups = [worker.process.pid for worker in pool._workers if worker.process]
    scoring = threading.Thread(target=lambda: pool.score([answer(HANGS, "x"), answer(HANGS, "y")]))
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
        "from megatron_opd.recipe.rewards import RewardConfig\n"
        "from megatron_opd.verify.pool import VerifierPool\n"
        "pool = VerifierPool(RewardConfig())\n"
        "pool.warm_up()\n"
        "print(pool._workers[0].process.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, env=environment, cwd=tmp_path
    ) as trainer:
        assert trainer.stdout is not None
        group = int(trainer.stdout.readline())
        assert not is_group_gone(group)
        trainer.kill()
        assert trainer.stdout.read() == b""
    wait_until(lambda: is_group_gone(group))


def test_a_worker_that_cannot_start_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with (
        VerifierPool(RewardConfig()) as pool,
        pytest.raises(RunError, match="reward worker did not start"),
    ):
        pool.score([answer(r"\boxed{2x}", "2x")])


integers = st.integers(-(10**13), 10**13) | st.integers(-120, 120)


@settings(max_examples=150, deadline=None)
@given(
    integers, integers | st.sampled_from([-1, 0, 1]), st.sampled_from(["", "0", " ", "-", "+", "%"])
)
def test_integers_are_compared_as_math_verify_does(gold: int, offset: int, prefix: str) -> None:
    for content in (str(gold), str(gold + offset), str(-gold), f"{prefix}{gold}"):
        reason = compare_plain(content, str(gold))
        assert reason is None or reason == math_verdict(boxed(content), str(gold))
    assert compare_plain(str(gold), str(gold)) == "correct"
