"""Programs judged by the tests of a problem, in LiveCodeBench's format."""

import base64
import contextlib
import json
import os
import pickle
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_opd.checks.training import _check_suites
from megatron_opd.contracts.rows import Verdict
from megatron_opd.contracts.suites import Answer, SuiteProtocol
from megatron_opd.errors import ConfigError
from megatron_opd.recipe.data import TemplateConfig
from megatron_opd.recipe.keys import EvalConfig, SuiteConfig
from megatron_opd.recipe.load import load_config
from megatron_opd.recipe.rewards import RewardConfig
from megatron_opd.sandbox.layers import ALLOW_WEAK, Layers
from megatron_opd.sandbox.limits import Limits
from megatron_opd.suites.open import open_suites
from megatron_opd.tasks.tokenizer import load_tokenizer
from megatron_opd.verify.graders import code, code_tests
from megatron_opd.verify.graders.code import CodeGrader, CodeOptions, options_of
from megatron_opd.verify.graders.code_answer import program_in, same_output, same_value
from megatron_opd.verify.graders.code_program import MODULES, names_by_module
from megatron_opd.verify.graders.code_tests import BadTests, read_tests, text_of_pickle
from megatron_opd.verify.graders.open import open_graders
from tests.unit.byte_tokenizer import write_byte_tokenizer
from tests.unit.code_problems import PROBLEMS, SOLUTIONS, answer, packed, row, said
from tests.unit.hostile_pickles import PICKLES


@pytest.fixture(scope="module")
def grader() -> Iterator[CodeGrader]:
    try:
        opened = CodeGrader({"cpu_seconds": 1, "workers": 2, "memory_gib": 0.5})
    except ConfigError as error:
        pytest.skip(str(error))
    with opened:
        yield opened


def reasons(verdicts: list[Verdict]) -> list[str]:
    return [verdict.reason for verdict in verdicts]


# ------------------------------------------------------------------------------------ right answers
def test_solutions_pass_and_those_of_other_problems_do_not(grader: CodeGrader) -> None:
    right = [answer(key, code) for key, code in SOLUTIONS.items()]
    assert reasons(grader.grade(right)) == ["correct"] * 6
    codes = list(SOLUTIONS.values())
    others = [answer(key, codes[place - 1]) for place, key in enumerate(SOLUTIONS)]
    verdicts = grader.grade(others)
    assert not any(verdict.correct or verdict.score for verdict in verdicts)
    assert set(reasons(verdicts)) <= {"wrong", "exception"}


def test_a_verdict_has_its_program_and_equal_ones_are_judged_once(grader: CodeGrader) -> None:
    slow = "import time\ntime.sleep(0.3)\nprint(sum(map(int, input().split())))"
    started = time.monotonic()
    verdicts = grader.grade([answer("sum_of_a_line", slow, sample=n) for n in range(40)])
    assert time.monotonic() - started < 20
    assert verdicts == [Verdict(1.0, True, "correct", slow)] * 40


@pytest.mark.parametrize(
    ("key", "code"),
    [
        ("pairs_with_sum", "return np.int64({value})"),
        ("pairs_with_sum", "return type('Whole', (int,), {{}})({value})"),
        ("running_means", "return [np.float64(mean) for mean in {value}]"),
        ("running_means", "return [np.float32(0) + 1.5 if m == 1.5 else m for m in {value}]"),
        ("first_words", "return Counter({value})"),
        ("first_words", "return {{np.str_(k): np.int8(n) for k, n in {value}.items()}}"),
    ],
)
def test_a_value_may_be_of_a_subclass_or_of_numpy(grader: CodeGrader, key: str, code: str) -> None:
    problem = PROBLEMS[key]
    function = json.loads(problem["metadata"])["func_name"]
    solved = SOLUTIONS[key]
    call = f"Solution().{function}" if "class Solution" in solved else function
    body = code.format(value="solved(*arguments)")
    program = (
        f"import numpy as np\n{solved}\nsolved = {call}\n"
        f"class Solution:\n    def {function}(self, *arguments):\n        {body}"
    )
    assert reasons(grader.grade([answer(key, program)])) == ["correct"]


def test_names_that_only_the_grader_has_do_no_harm(
    grader: CodeGrader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "last_value", 1, raising=False)
    names_by_module.cache_clear()
    try:
        assert names_by_module()["last_value"] == "sys"
        code = "last_value = sum(map(int, input().split()))\nprint(last_value)"
        assert reasons(grader.grade([answer("sum_of_a_line", code)])) == ["correct"]
    finally:
        names_by_module.cache_clear()


def test_a_program_that_did_not_begin_is_nobodys_verdict(
    grader: CodeGrader, monkeypatch: pytest.MonkeyPatch
) -> None:
    if grader._sandboxes[0].layers.landlock:
        pytest.skip("needs Landlock, whose descriptors are too many for the limit")
    monkeypatch.setattr(grader, "_limits", lambda expected: Limits(open_files=3))
    (verdict,) = grader.grade([answer("sum_of_a_line", "print(6)")])
    assert (verdict.score, verdict.correct, verdict.reason) == (0.0, None, "crashed")


# ------------------------------------------------------------------------------------ wrong answers
@pytest.mark.parametrize(
    ("key", "code", "reason"),
    [
        ("sum_of_a_line", "print(6)", "wrong"),
        ("sum_of_a_line", "print(sum(map(int, input().split())), 'is it')", "wrong"),
        ("sum_of_a_line", "import os\nos._exit(0)", "wrong"),
        ("sum_of_a_line", "while True: pass", "timeout"),
        ("sum_of_a_line", "x = []\nwhile True: x.append(bytes(1 << 24))", "memory"),
        ("sum_of_a_line", "while True: print('x' * 10000)", "too_long"),
        ("sum_of_a_line", "def f(:", "exception"),
        ("sum_of_a_line", "import ctypes; ctypes.string_at(1)", "exception"),
        ("sum_of_a_line", "import torch", "exception"),
        ("sum_of_a_line", "(" * 5000, "exception"),
        ("sum_of_a_line", "x = " + "-" * 100000 + "1", "memory"),
        ("sum_of_a_line", "raise SystemExit", "wrong"),
        ("sum_of_a_line", "print(6)\nquit()", "wrong"),
        ("halves", "print('nan\\nnan')", "wrong"),
        ("pairs_with_sum", "class Solution:\n    def other(self): pass", "exception"),
        ("pairs_with_sum", "class Solution:\n    def countPairs(self): pass", "exception"),
        ("pairs_with_sum", "x = 1", "exception"),
        (
            "running_means",
            "class Solution:\n    def means(self, nums):\n        return [(1.0, 2.0)]",
            "exception",
        ),
        (
            "running_means",
            "class Solution:\n    def means(self, nums):\n        return np.array(nums)",
            "exception",
        ),
        (
            "first_words",
            "def first_words(lines):\n    return {1: 2}",
            "exception",
        ),
        (
            "running_means",
            "class Solution:\n    def means(self, nums):\n        return nums",
            "wrong",
        ),
    ],
)
def test_a_wrong_answer_scores_nothing(
    grader: CodeGrader, key: str, code: str, reason: str
) -> None:
    (verdict,) = grader.grade([answer(key, code)])
    assert (verdict.score, verdict.correct, verdict.reason) == (0.0, False, reason)


ALWAYS_EQUAL = """
class Equal(int):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    __hash__ = int.__hash__
class Solution:
    def countPairs(self, nums, k):
        return Equal(7)
"""
WRITES_ITSELF = """
import os
class Solution:
    def countPairs(self, nums, k):
        {before}
        os.write(3, b"{written}\\n")
        os._exit(0)
"""
PATCHED = """
import builtins, json
json.dumps = lambda *a, **k: "2"
json.loads = lambda *a, **k: 2
builtins.print = lambda *a, **k: None
class Solution:
    def countPairs(self, nums, k):
        return 5
"""
SWALLOWED = """
import sys, atexit
sys.excepthook = lambda *a: None
class Solution:
    def countPairs(self, nums, k):
        try:
            return undefined
        except BaseException:
            sys.exit(0)
"""
FROM_THE_FRAMES = """
import gc, sys
class Solution:
    def countPairs(self, nums, k):
        frame = sys._getframe()
        seen = []
        while frame:
            seen.append(repr(frame.f_locals) + repr(frame.f_globals))
            frame = frame.f_back
        for each in gc.get_objects():
            if type(each) is dict and "output" in each:
                return each["output"]
        # the expected values of the private tests: 0 and 3
        return 2 if "'2'" in "".join(seen) else -1
"""


@pytest.mark.parametrize(
    "code",
    [
        ALWAYS_EQUAL,
        WRITES_ITSELF.format(before="pass", written="2"),
        WRITES_ITSELF.format(before="os.write(3, bytes(32))", written="2"),
        PATCHED,
        SWALLOWED,
        FROM_THE_FRAMES,
        "import os\nos._exit(0)",
        "import sys\nsys.exit(0)",
        "class Solution:\n    def countPairs(self, nums, k):\n        return [2]",
        "class Solution:\n    def countPairs(self, nums, k):\n        return '2'",
        "class Solution:\n    def countPairs(self, nums, k):\n        return None",
        "class Solution:\n    def countPairs(self, nums, k):\n        return float('nan')",
        "class Solution:\n    def __getattr__(self, name):\n        return lambda *a: self",
    ],
    ids=[
        "__eq__",
        "writes itself",
        "writes itself, with a nonce of its own",
        "patched",
        "swallowed",
        "frames",
        "_exit",
        "exit",
        "list",
        "text",
        "none",
        "nan",
        "getattr",
    ],
)
def test_a_pass_cannot_be_faked(grader: CodeGrader, code: str) -> None:
    (verdict,) = grader.grade([answer("pairs_with_sum", code)])
    assert not verdict.correct and verdict.score == 0.0
    assert verdict.reason in ("wrong", "exception")


def test_no_state_goes_from_one_test_to_the_next(grader: CodeGrader) -> None:
    """The right answers to all three tests in their order, for whoever could count them."""
    code = (
        "import os, tempfile\n"
        "try:\n    open('count', 'a').write('x')\n    n = os.path.getsize('count')\n"
        "except OSError:\n    n = 1\n"
        "print([6, 0, 5][n - 1])"
    )
    assert reasons(grader.grade([answer("sum_of_a_line", code)])) == ["wrong"]


# --------------------------------------------------------------------------------------- extraction
@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("```python\nprint(1)\n```", "print(1)"),
        ("First\n```\nprint(1)\n```\nthen\n```py\nprint(2)\n```\nDone.", "print(2)"),
        ("```python\nprint(1)\n```\n```", "print(1)"),  # one fence too many
        ("```python\nprint(1)\n```\nand\n```python\nprint(2", "print(1)"),  # cut off
        ("```python\nprint(1)\n```python\nprint(2)\n```", "print(2)"),
        ("  ```python\n  if x:\n      y\n  ```", "if x:\n    y"),
        ("````python\nprint(1)\n````", "print(1)"),
        ("````markdown\n```python\nprint(1)\n```\n````", "print(1)"),
        ("Answer: ```python\nprint(1)\n```", "print(1)"),
        ("Answer: ```\nprint(1)\n```", ""),
        ("```py\nx = 'not: ```python'\ny = x\n```", "x = 'not: ```python'\ny = x"),
        ("```py\nprint(1)\n```\nIt is ```print(2)```.\n```3```", "print(1)"),
        ("print(1)", ""),
        ("```python\n\n```", ""),
        ("", ""),
    ],
)
def test_the_program_is_the_last_closed_block(text: str, program: str) -> None:
    assert program_in(text) == program


def test_without_a_program_there_is_no_answer(grader: CodeGrader) -> None:
    said_of = [said("halves", "I do not know."), said("halves", "```python\nx", truncated=True)]
    verdicts = grader.grade(said_of)
    assert verdicts == [Verdict(0.0, False, "no_answer"), Verdict(0.0, False, "truncated")]
    assert grader.grade([]) == []


def test_numpy_is_there_and_nothing_that_lies_beside_it(grader: CodeGrader) -> None:
    code = "import numpy as np\nprint(np.array(input().split(), int).sum())"
    assert reasons(grader.grade([answer("sum_of_a_line", code)])) == ["correct"]
    beside = "import math_verify\nprint(sum(map(int, input().split())))"
    assert reasons(grader.grade([answer("sum_of_a_line", beside)])) == ["exception"]
    with pytest.raises(ConfigError, match="nowhere, is not installed"):
        CodeGrader({"packages": ["nowhere"]})


def test_a_suite_of_programs_is_read_and_graded(grader: CodeGrader, tmp_path: Path) -> None:
    rows = [json.dumps(PROBLEMS[key]) + "\n" for key in SOLUTIONS]
    (tmp_path / "test6.jsonl").write_text("".join(rows))
    (suite,) = open_suites(["livecodebench_v6"], data={"livecodebench_v6": str(tmp_path)})
    asked = [suite.asked(question, 0) for question in suite.questions]
    assert [each.question.key for each in asked] == list(SOLUTIONS)
    answers = [
        Answer(each, f"```python\n{SOLUTIONS[each.question.key]}\n```", False) for each in asked
    ]
    assert reasons(grader.grade(answers)) == ["correct"] * 6


def test_a_program_in_the_reasoning_is_no_answer(grader: CodeGrader) -> None:
    block = f"```python\n{SOLUTIONS['sum_of_a_line']}\n```\n"
    texts = [f"<think>{block}", f"<think>{block}</think>Done.", f"</think>{block}"]
    verdicts = grader.grade([said("sum_of_a_line", text) for text in texts])
    assert reasons(verdicts) == ["no_answer", "no_answer", "correct"]


def test_the_code_grader_is_opened_by_its_name(grader: CodeGrader) -> None:
    with contextlib.ExitStack() as closing:
        protocol = SuiteProtocol("own", 1, 0.0, 1.0, 512, "{problem}", grader="code")
        opened = open_graders({"": protocol}, RewardConfig(), closing)[""]
        assert isinstance(opened, CodeGrader)
        assert opened.options == CodeOptions()


# --------------------------------------------------------------------------------------- comparison
@pytest.mark.parametrize(
    ("printed", "expected", "same"),
    [
        ("1\n2\n", "1\n2", True),
        ("  1  \n 2\n\n", "1\n2\n", True),
        ("1 2", "1  2", True),  # as numbers
        ("a b", "a  b", False),
        ("1.50 2", "1.5 2.0", True),
        ("0.30000000000000004", "0.3", False),
        ("1e3", "1000", True),
        ("1\n\n2", "1\n2", False),
        ("Yes", "yes", False),
        ("nan", "nan", True),  # the same text
        ("NaN", "nan", False),
        ("sNaN", "1", False),
        ("", "", True),
        ("", "1", False),
        ("1 x", "1.0 x", False),
        ("1e999999999999999999", "1", False),
    ],
)
def test_output_is_compared_line_by_line(printed: str, expected: str, same: bool) -> None:
    assert same_output(printed.encode(), expected) is same


@pytest.mark.parametrize(
    ("written", "expected", "same"),
    [
        (b"n\n[1, 2]\n", "[1,2]", True),
        (b"m\n[1, 2]\n", "[1,2]", False),
        (b"[1, 2]\n", "[1,2]", False),
        (b"n\n1.0\n", "1", True),
        (b"n\n0.30000000000000004\n", "0.3", False),
        (b"n\ntrue\n", "1", True),  # as Python compares
        (b"n\nNaN\n", "NaN", False),
        (b"n\n" + b"9" * 6000 + b"\n", "9" * 6000, True),
        (b"n\n-" + b"9" * 50000 + b"\n", "-" + "9" * 50000, False),
        (b"n\n" + b"9" * 50000 + b"\n", "9" * 50000, True),
        (b"n\n" + b"9" * 50000 + b"\n", "9" * 49999 + "8", False),
        (b"n\n" + b"9" * 4000 + b"\n", "9" * 4001, False),
        (b"n\n" + b"1" + b"0" * 5000 + b"\n", "1e5000", False),  # a float, and infinite
        (b"n\n" + b"9" * 60000 + b"\n", "9" * 60000, False),
        (b"n\n" + b"[" * 100000 + b"\n", "1", False),
        (b"n\n\xff\n", "1", False),
        (b"n\n1\n2\n", "1", False),
        (b"", "1", False),
    ],
)
def test_values_are_compared_exactly(written: bytes, expected: str, same: bool) -> None:
    assert same_value(written, "n", expected) is same


def test_names_are_those_of_the_star_imports() -> None:
    """The last module that has a name gives it, as `from ... import *` of all of them does."""
    space: dict[str, Any] = {}
    for name in MODULES:
        exec(f"from {name} import *", space)
    names = names_by_module()
    assert {"deque", "heappush", "lru_cache", "List", "sqrt", "accumulate", "inf"} <= names.keys()
    import builtins
    import importlib

    # importing a package binds its submodules, too
    public = {n for n in space if not n.startswith("_") and not hasattr(builtins, n)}
    assert names.keys() == public
    assert all(getattr(importlib.import_module(names[n]), n) is space[n] for n in names)


# -------------------------------------------------------------------------------------------- tests
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_compressed_tests_are_read_whatever_the_pickle(protocol: int) -> None:
    tests = [{"input": "1 ∑\n", "output": "2" * 100000, "testtype": "stdin"}] * 3
    details = {"public_test_cases": "[]", "private_test_cases": packed(tests, protocol)}
    read = read_tests(details)
    assert read.inputs == ("1 ∑\n",) * 3
    assert read.outputs == ("2" * 100000,) * 3
    assert read.function == ""


def test_public_tests_stand_before_private_ones() -> None:
    read = read_tests(PROBLEMS["pairs_with_sum"])
    assert read.inputs[0] == "[1, 2, 3, 4]\n5"
    assert len(read.inputs) == 3
    assert read.function == "countPairs"
    # a reader of Parquet or a suite's own file may have parsed the columns
    parsed = {
        name: json.loads(PROBLEMS["halves"][name])
        for name in ("public_test_cases", "private_test_cases", "metadata")
    }
    assert read_tests(parsed) == read_tests(PROBLEMS["halves"])


def damaged(**columns: object) -> dict[str, object]:
    return PROBLEMS["sum_of_a_line"] | columns


@pytest.mark.parametrize(
    ("details", "words"),
    [
        (PROBLEMS["nothing_to_test"], "no tests"),
        ({}, "no tests"),
        (damaged(private_test_cases="not base64!"), "private_test_cases"),
        (damaged(private_test_cases=base64.b64encode(b"not zlib").decode()), "private_test_cases"),
        (
            damaged(private_test_cases=packed([])[:-8]),
            "private_test_cases",
        ),
        (damaged(private_test_cases="[1, 2]"), "list of objects"),
        (damaged(private_test_cases='[{"input": "1", "testtype": "stdin"}]'), "'output'"),
        (damaged(public_test_cases="{"), "public_test_cases"),
        (damaged(public_test_cases="[" * 100000), "public_test_cases"),
        (damaged(metadata='{"func_name": "f"}'), "stdin with the function 'f'"),
        (damaged(metadata='{"func_name": "f(); import os"}'), "is no name"),
        (damaged(metadata="[1]"), "metadata"),
    ],
)
def test_tests_that_cannot_be_run_are_named(details: dict[str, object], words: str) -> None:
    with pytest.raises(BadTests, match=words.replace("(", "\\(")):
        read_tests(details)


def test_a_problem_without_tests_is_nobodys_pass(grader: CodeGrader) -> None:
    verdicts = grader.grade([answer("nothing_to_test", "print(1)")])
    assert verdicts == [Verdict(0.0, None, "bad_gold", "print(1)")]


@pytest.mark.parametrize("kind", PICKLES)
def test_private_tests_run_no_code(kind: str, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    data = PICKLES[kind](mark)
    with pytest.raises(BadTests, match="pickle"):
        text_of_pickle(data)
    written = base64.b64encode(zlib.compress(data)).decode()
    with pytest.raises(BadTests, match="pickle"):
        read_tests(damaged(private_test_cases=written))
    assert not mark.exists()


def test_a_bomb_of_zeros_is_not_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_tests, "MOST_BYTES", 2**20)
    bomb = base64.b64encode(zlib.compress(bytes(2**24))).decode()
    with pytest.raises(BadTests, match="more than 1048576 bytes"):
        read_tests(damaged(private_test_cases=bomb))


# ------------------------------------------------------------------------------------------ options
def test_options_are_checked_by_name_and_type() -> None:
    assert options_of({"cpu_seconds": 10, "workers": 3}).cpu_seconds == 10
    for grading, words in (
        ({"seconds": 1}, "grading.seconds"),
        ({"cpu_seconds": "6"}, "grading.cpu_seconds"),
        ({"cpu_seconds": True}, "grading.cpu_seconds"),
        ({"workers": 1.5}, "grading.workers"),
        ({"workers": -1}, "negative"),
        ({"memory_gib": float("nan")}, "negative"),
        ({"cpu_seconds": None}, "grading.cpu_seconds"),
        ({"packages": "numpy"}, "grading.packages"),
        ({"packages": ["numpy.linalg"]}, "grading.packages"),
    ):
        with pytest.raises(ConfigError, match=words):
            options_of(grading)


def test_without_a_sandbox_there_is_no_grader(
    grader: CodeGrader, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = Layers("", "not in this kernel", "bwrap is not on PATH")
    for unset in ("", "0"):
        monkeypatch.setenv(ALLOW_WEAK, unset)
        with pytest.raises(ConfigError, match="MEGATRON_OPD_ALLOW_WEAK_SANDBOX=1"):
            CodeGrader({}, bare)
    monkeypatch.setenv(ALLOW_WEAK, "1")
    with CodeGrader({"workers": 1}, bare) as weak:
        key = "sum_of_a_line"
        assert reasons(weak.grade([answer(key, SOLUTIONS[key])])) == ["correct"]
        assert weak.versions["sandbox"] == "seccomp"


def test_a_suite_without_a_sandbox_is_refused_before_an_engine_starts(
    grader: CodeGrader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [json.dumps(PROBLEMS[key]) + "\n" for key in SOLUTIONS]
    (tmp_path / "test6.jsonl").write_text("".join(rows))
    bare = Layers("", "not in this kernel", "bwrap is not on PATH")
    monkeypatch.setattr(code, "layers", lambda packages: bare)
    settings = SuiteConfig(every=4, samples=1, max_tokens=20, data=str(tmp_path))
    config = load_config("demo")
    write_byte_tokenizer(tmp_path)
    config = replace(
        config,
        student=replace(config.student, path=str(tmp_path)),
        max_sequence_length=4096,
        data=replace(config.data, template=TemplateConfig(kind="raw")),
        eval=EvalConfig(suites={"livecodebench_v6": settings}),
    )
    tokenizer = load_tokenizer(str(tmp_path))
    with pytest.raises(ConfigError, match="could read the user's files"):
        _check_suites(config, tokenizer)
    monkeypatch.undo()
    assert any("6 questions" in line for line in _check_suites(config, tokenizer))


def test_ranks_share_the_cores(
    grader: CodeGrader, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(16))
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr(code, "CPU_QUOTA", quota)
    for written, ranks, share in (
        ("", "1", 16),
        ("max 100000\n", "8", 2),
        ("max 100000\n", "64", 1),
        ("350000 100000\n", "1", 4),
        ("350000 100000\n", "2", 2),
        ("20000 100000\n", "1", 1),
        ("6400000 100000\n", "1", 16),
    ):
        quota.write_text(written)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        with CodeGrader({}, grader._sandboxes[0].layers) as other:  # none of its servers starts
            assert len(other._sandboxes) == share


def test_a_closed_grader_leaves_nothing(grader: CodeGrader) -> None:
    other = CodeGrader({"workers": 1, "cpu_seconds": 1})
    other.grade([answer("sum_of_a_line", SOLUTIONS["sum_of_a_line"])])
    server = other._sandboxes[0]._server
    scratch = other._sandboxes[0]._scratch
    # bubblewrap's is in its own namespace
    assert server is not None
    assert os.path.isdir(scratch) == (not other._sandboxes[0].layers.command)
    other.close()
    other.close()
    assert server.poll() is not None
    assert not os.path.exists(scratch)


def test_rows_are_in_the_published_format() -> None:
    assert list(row("a", [], [])) == [
        "question_title",
        "question_content",
        "platform",
        "question_id",
        "contest_id",
        "contest_date",
        "starter_code",
        "difficulty",
        "public_test_cases",
        "private_test_cases",
        "metadata",
    ]
