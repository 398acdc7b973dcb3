"""Invented problems in the format in which LiveCodeBench is published, and solutions to them."""

import base64
import json
import pickle
import zlib
from typing import Any

from megatron_opd.contracts.suites import Answer, Asked, Question

Test = tuple[str, str]


def packed(tests: list[dict[str, str]], protocol: int = pickle.DEFAULT_PROTOCOL) -> str:
    """Private tests as most problems have them."""
    data = pickle.dumps(json.dumps(tests), protocol=protocol)
    return base64.b64encode(zlib.compress(data)).decode()


def row(
    name: str,
    public: list[Test],
    private: list[Test],
    *,
    function: str = "",
    starter: str = "",
    compressed: bool = True,
) -> dict[str, Any]:
    """A line of test6.jsonl."""
    kind = "functional" if function else "stdin"
    written = [
        [{"input": given, "output": expected, "testtype": kind} for given, expected in tests]
        for tests in (public, private)
    ]
    return {
        "question_title": name.title(),
        "question_content": f"Invented: {name}.",
        "platform": "leetcode" if function else "atcoder",
        "question_id": name.replace(" ", "_"),
        "contest_id": "invented_1",
        "contest_date": "2025-02-01T00:00:00",
        "starter_code": starter,
        "difficulty": "easy",
        "public_test_cases": json.dumps(written[0]),
        "private_test_cases": packed(written[1]) if compressed else json.dumps(written[1]),
        "metadata": json.dumps({"func_name": function} if function else {}),
    }


PROBLEMS: dict[str, dict[str, Any]] = {
    problem["question_id"]: problem
    for problem in (
        row("sum of a line", [("1 2 3\n", "6\n")], [("-1 1\n", "0\n"), ("5\n", "5")]),
        row("halves", [("2\n1\n3\n", "0.5\n1.5\n")], [("1\n7\n", "3.50\n")], compressed=False),
        row("hailstone steps", [("6\n", "8\n")], [("1\n", "0\n"), ("27\n", "111\n")]),
        row(
            "pairs with sum",
            [("[1, 2, 3, 4]\n5", "2")],
            [("[]\n1", "0"), ("[2, 2, 2]\n4", "3")],
            function="countPairs",
            starter="class Solution:\n    def countPairs(self, nums: List[int], k: int) -> int:\n",
        ),
        row(
            "running means",
            [("[1, 2, 3]", "[1.0, 1.5, 2.0]")],
            [("[]", "[]"), ("[0.1, 0.2]", "[0.1, 0.15000000000000002]")],
            function="means",
            starter="class Solution:\n    def means(self, nums: List[int]) -> List[float]:\n",
        ),
        row(
            "first words",
            [('["a b", "c d"]', '{"a": 1, "c": 1}')],
            [('["x y", "x z"]', '{"x": 2}')],
            function="first_words",
        ),
        row("nothing to test", [], []),
    )
}

SOLUTIONS = {
    "sum_of_a_line": "print(sum(map(int, input().split())))",
    "halves": (
        "def main():\n"
        "    for _ in range(int(input())):\n"
        "        print(int(input()) / 2)\n"
        "if __name__ == '__main__':\n"
        "    main()"
    ),
    "hailstone_steps": (
        "n = int(sys.stdin.readline())\n"
        "@cache\n"
        "def steps(n):\n"
        "    return 0 if n == 1 else 1 + steps(n // 2 if n % 2 == 0 else 3 * n + 1)\n"
        "print(steps(n))\n"
        "exit(1)"
    ),
    "pairs_with_sum": (
        "class Solution:\n"
        "    def countPairs(self, nums: List[int], k: int) -> int:\n"
        "        seen = Counter()\n"
        "        pairs = 0\n"
        "        for number in nums:\n"
        "            pairs += seen[k - number]\n"
        "            seen[number] += 1\n"
        "        print('looking', pairs)\n"
        "        return pairs"
    ),
    "running_means": (
        "class Solution:\n"
        "    def means(self, nums):\n"
        "        return tuple(s / n for n, s in enumerate(accumulate(nums), 1))"
    ),
    "first_words": (
        "def first_words(lines):\n"
        "    found = {}\n"
        "    for line in lines:\n"
        "        word = line.split()[0]\n"
        "        found[word] = found.get(word, 0) + 1\n"
        "    return found"
    ),
}


def answer(key: str, code: str, *, sample: int = 0, truncated: bool = False) -> Answer:
    """A completion with `code` as its block."""
    return said(key, f"So:\n```python\n{code}\n```\n", sample=sample, truncated=truncated)


def said(key: str, text: str, *, sample: int = 0, truncated: bool = False) -> Answer:
    problem = PROBLEMS[key]
    question = Question(key, problem["question_content"], "", details=problem)
    return Answer(Asked(question, sample, problem["question_content"], ""), text, truncated)
