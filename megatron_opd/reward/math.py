"""math-verify's verdict on one answer. Runs in a worker's child process, which the kernel stops at the limits."""

import logging
from functools import lru_cache
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from megatron_opd.reward.answer import boxed

# math-verify warns that its signal-based time limits are off: here the worker's interval timer replaces them.
logging.getLogger("math_verify").setLevel(logging.ERROR)

EXTRACTION = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())


def judge(answer: str, gold: str) -> str:
    """Return "correct", "wrong", "no_answer" (nothing to parse), "bad_gold" (the gold answer) or "error"."""
    try:
        gold_values = parse_gold(gold)
        if not gold_values:
            return "bad_gold"
        values = parse(answer, EXTRACTION, parsing_timeout=None)
        if not values:
            return "no_answer"
        return "correct" if verify(gold_values, values, timeout_seconds=None) else "wrong"
    except Exception:  # a hostile answer may raise anything, MemoryError and RecursionError included
        return "error"


@lru_cache(maxsize=64)  # the samples of a group share their gold answer
def parse_gold(gold: str) -> list[Any]:
    """Parse a gold answer written as a box, as inline LaTeX or as bare LaTeX such as `\\frac{1}{2}`."""
    text = gold if "\\boxed" in gold else boxed(gold)
    return parse(text, EXTRACTION, parsing_timeout=None)
