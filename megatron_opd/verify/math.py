"""math-verify's verdict on an answer, in a worker's child process, which the kernel limits."""

import logging
import re
from dataclasses import replace
from functools import lru_cache
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from megatron_opd.verify.answer import boxed, content_of
from megatron_opd.verify.plain import (
    DECIMALS,
    NUMBER_WORDS,
    UNIT,
    compare_plain,
    decimals_to_compare,
    in_ascii,
    in_digits,
)

# math-verify warns that its signal-based time limits are off; the worker's interval timer replaces
# them.
logging.getLogger("math_verify").setLevel(logging.ERROR)

_LATEX = LatexExtractionConfig(boxed_match_priority=0)
_WITHOUT_UNITS = replace(_LATEX.normalization_config, units=False)
_LATEX_WITHOUT_UNITS = replace(_LATEX, normalization_config=_WITHOUT_UNITS)
_VERIFY_DIGITS = 15  # math-verify's precision for expressions that are not decimals
# A letter at a coefficient or in a sum is a variable; math-verify takes the t of 3t for tonnes, and
# the ab of 2ab for a unit too.
_VARIABLE = re.compile(
    rf"(?:[\d)}}]|[-+*/=]\s*)(?!{UNIT}$)[a-zA-Z]{{1,3}}$|[a-zA-Z]\s*[-+*<>]|[a-zA-Z]\s*\^.*[a-zA-Z]"
)
_COMMAND = re.compile(r"\\[a-zA-Z]+(?:\s*\{[^{}]*\})?")


def grade(answer: str, gold: str) -> str:
    """The reason of a verdict: "correct", "wrong", "no_answer", "bad_gold" or "error".

    `answer` is a result of `final_answer`, `gold` one of `read_gold`. "no_answer" and "bad_gold"
    are answers and gold answers that cannot be parsed.
    """
    try:
        content = content_of(answer)
        if verdict := compare_plain(content, gold):
            return verdict
        in_numbers = (in_digits(answer), in_digits(gold))
        verdict = math_verdict(*in_numbers)
        if verdict == "wrong" and in_numbers != (answer, gold):
            verdict = math_verdict(answer, gold)  # 2e-3 is also 2e - 3
        return verdict
    except Exception:  # a hostile answer can raise any, MemoryError and RecursionError included
        return "error"


def math_verdict(answer: str, gold: str) -> str:
    """The reason that `grade` returns, by math-verify alone."""
    has_variable = _VARIABLE.search(_COMMAND.sub("}", gold))
    with_units = not (has_variable or NUMBER_WORDS.search(answer + gold))
    gold_values = parse_gold(gold, with_units)
    if not gold_values:
        return "bad_gold"
    values = _parse(answer, with_units)
    if not values:
        return "no_answer"
    decimals = decimals_to_compare(answer, gold)
    is_equal = verify(
        gold_values,
        values,
        float_rounding=decimals,
        numeric_precision=_VERIFY_DIGITS + decimals - DECIMALS,
        allow_set_relation_comp=True,
        timeout_seconds=None,
    )
    if is_equal:
        return "correct"
    return "bad_gold" if all(isinstance(value, str) for value in gold_values) else "wrong"


@lru_cache(maxsize=64)  # the samples of a group share their gold answer
def parse_gold(gold: str, with_units: bool = True) -> list[Any]:
    """The value and the text of bare LaTeX such as `\\frac{1}{2}`, or its text alone."""
    return _parse(boxed(gold), with_units)


def _parse(text: str, with_units: bool) -> list[Any]:
    latex = _LATEX if with_units else _LATEX_WITHOUT_UNITS
    text = in_ascii(text).replace(r"\varnothing", r"\emptyset")
    return parse(text, (latex, ExprExtractionConfig()), parsing_timeout=None)


def value_of(text: str) -> float | None:
    """The value of an expression without variables; None of anything else."""
    for value in _parse(boxed(in_digits(text)), with_units=False):
        number = getattr(value, "rhs", value)  # of x = 5
        if getattr(number, "is_number", False) and getattr(number, "is_real", False):
            return float(number)
    return None
