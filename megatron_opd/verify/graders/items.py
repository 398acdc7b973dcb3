"""How an answer is compared with an item's gold answer, in a worker: units, tolerances, several
answers.

What an item brings, as JSON: `gold`, and where it has them `relative_tolerance`, `units`
("ignored" or "compared"), `several` (its answers in any order, none extra), `kind` ("Tuple": in
their order) and `error`, the absolute tolerance of every component.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from megatron_opd.verify.answer import boxed, read_gold
from megatron_opd.verify.math import grade, math_verdict, value_of
from megatron_opd.verify.plain import read_number

_MOST_ANSWERS = 40  # of one item; a longer list is no answer
_NAME = re.compile(r"\s*(?:\\?[A-Za-z]+(?:_\{?\w+\}?)?(?:\([^()]*\))?)\s*(?:=|\\in|:)\s*")
_BRACES = re.compile(r"\s*(?:\\left)?\\\{(.*?)(?:\\right)?\\\}\s*", re.DOTALL)
_PARENTHESES = re.compile(r"\s*(?:\\left)?\((.*?)(?:\\right)?\)\s*", re.DOTALL)
_SEPARATOR = re.compile(r",|;|\band\b|\\text\s*\{\s*(?:,\s*)?(?:and|or)\s*\}")
_OPEN_OR_CLOSE = re.compile(r"\\[{}]|[()\[\]{}]")
_GROUPED = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:\{,\}\d{3})+(?![\d,])")
_GAP = r"(?:\s|~|\\[,;:! ]|\\quad)"
# A letter at a number is a variable, set off it is a unit.
_UNIT = re.compile(
    rf"(?<=[\d.}}\s]){_GAP}*\\(?:text|mathrm|mbox|rm|operatorname)\s*\{{.*$"
    rf"|(?<=[\d.}}]){_GAP}+[A-Za-z°Å][A-Za-z°Å/^*\s{{}}\-\d.]*$",
    re.DOTALL,
)
_SHOWN = re.compile(r"\s|~|\\[,;:! ]|\\(?:left|right|displaystyle)(?![a-zA-Z])")


@dataclass(frozen=True)
class Wanted:
    """What an answer is compared with."""

    gold: str
    relative_tolerance: float = 0.0
    units: str = "compared"
    several: bool = False
    kind: str = ""
    error: str = ""

    @property
    def errors(self) -> list[float]:
        """The absolute tolerance of every component; one is that of all."""
        texts = [text.strip() for text in self.error.split(",")]
        return [float(text) for text in texts if text]


def judge_item(answer: str, wanted: str) -> str:
    """The reason of a verdict: correct, wrong, no_answer, bad_gold or error."""
    try:
        return _judged(answer, Wanted(**json.loads(wanted)))
    except Exception:  # a hostile answer can raise any, MemoryError and RecursionError included
        return "error"


def judge_legacy(answer: str, wanted: str) -> str:
    """Judges as the graders behind the papers' numbers do: plain numbers within the relative
    tolerance, the rest by math-verify, for which 4.5e33 holds Euler's number."""
    try:
        item = Wanted(**json.loads(wanted))
        values = [_float(answer), _float(item.gold)]
        if None not in values:
            near = _near(values[0], values[1], item.relative_tolerance, 0.0)
            return "correct" if near else "wrong"
        gold = read_gold(item.gold)
        return "bad_gold" if gold is None else math_verdict(boxed(answer), gold)
    except Exception:
        return "error"


def _judged(answer: str, item: Wanted) -> str:
    gold = read_gold(item.gold)
    if gold is None:
        return "bad_gold"
    errors = item.errors
    if item.several:
        return _judge_several(answer, gold, item)
    if len(errors) > 1 or (errors and item.kind == "Tuple"):
        return _judge_components(answer, gold, item, errors)
    return _judge_one(answer, gold, item, errors[0] if errors else 0.0)


def _judge_several(answer: str, gold: str, item: Wanted) -> str:
    """All gold answers in any order, none extra."""
    golds = _listed(gold)
    answers = _listed(answer)
    if len(answers) != len(golds) or len(golds) > _MOST_ANSWERS:
        # x = \pm 2 and intervals are one answer in one place, two in another
        return _judge_one(answer, gold, item, 0.0) if len(answers) == 1 else "wrong"
    errors = item.errors or [0.0]
    left = list(answers)
    for place, one in enumerate(golds):
        error = errors[place] if place < len(errors) else errors[-1]
        for other in left:
            if _judge_part(other, one, item, error) == "correct":
                left.remove(other)
                break
        else:
            return "wrong"
    return "correct"


def _judge_part(answer: str, gold: str, item: Wanted, error: float) -> str:
    """One of several answers, which may be a tuple."""
    if error and item.kind == "Tuple":
        return _judge_components(answer, gold, item, [error])
    return _judge_one(answer, gold, item, error)


def _judge_components(answer: str, gold: str, item: Wanted, errors: Sequence[float]) -> str:
    """Components in their order, every one within its error."""
    golds = _split(_inside(gold, _PARENTHESES))
    answers = _split(_inside(answer, _PARENTHESES))
    if len(answers) != len(golds) or len(golds) > _MOST_ANSWERS:
        return "wrong"
    for place, (one, other) in enumerate(zip(golds, answers, strict=True)):
        error = errors[place] if place < len(errors) else errors[-1]
        reason = _judge_one(other, one, item, error)
        if reason != "correct":
            return reason
    return "correct"


def _judge_one(answer: str, gold: str, item: Wanted, error: float) -> str:
    if item.units == "ignored":
        answer = _without_unit(answer)
        gold = _without_unit(gold)
    if _plain(answer) == _plain(gold):  # computer algebra takes 20 ms
        return "correct"
    reason = grade(boxed(answer), gold)
    if reason != "wrong" or not (error or item.relative_tolerance):
        return reason
    # grade compares numbers exactly; a name before one is no part of it
    near = _near(_value(answer), _value(gold), item.relative_tolerance, error)
    return "correct" if near else "wrong"


def _plain(text: str) -> str:
    """The text without what LaTeX only shows differently."""
    return _SHOWN.sub("", text.replace("dfrac", "frac").replace("tfrac", "frac"))


def _near(value: float | None, gold: float | None, relative: float, absolute: float) -> bool:
    if value is None or gold is None:
        return False
    distance = abs(Fraction(value) - Fraction(gold))
    allowed = max(Fraction(relative) * abs(Fraction(gold)), Fraction(absolute))
    # a tolerance that is exactly used up is not exceeded
    return distance <= allowed * (1 + Fraction(1, 10**9))


def _value(text: str) -> float | None:
    """The value of a number or of an expression without variables; None of anything else."""
    text = _NAME.sub("", text, count=1) if _NAME.match(text) else text
    if number := read_number(text):
        return float(number.value / 100 if number.is_percent else number.value)
    return value_of(text)


def _float(text: str) -> float | None:
    """The value of digits as programs write them; None of anything else."""
    try:
        value = float(text.replace(",", "").strip(" $"))
    except ValueError:
        return None
    return value if abs(value) < float("inf") else None


def _without_unit(text: str) -> str:
    r"""The text without the unit behind its number: `4.5 \times 10^{33} \text{ erg/s}`."""
    match = _UNIT.search(text)
    if match is None:
        return text
    number = text[: match.start()].rstrip(" ~\\,;:!")
    bare = _NAME.sub("", number, count=1) if _NAME.match(number) else number
    return number if read_number(bare) else text


def _listed(text: str) -> list[str]:
    """The answers of a list, a set or a text with "and"; without repetition."""
    text = text.strip().strip("$")
    if _NAME.match(text) and _BRACES.fullmatch(text, _NAME.match(text).end()):  # type: ignore[union-attr]
        text = _NAME.sub("", text, count=1)
    return list(dict.fromkeys(_split(_inside(text, _BRACES))))


def _inside(text: str, enclosing: re.Pattern[str]) -> str:
    match = enclosing.fullmatch(text)
    return match[1] if match and len(_split(text)) == 1 else text


def _split(text: str) -> list[str]:
    """The parts between separators that no bracket encloses, without dollars."""
    text = _GROUPED.sub(lambda match: match.group().replace("{,}", ""), text)
    parts = []
    depth = 0
    start = 0
    position = 0
    while position < len(text):
        bracket = _OPEN_OR_CLOSE.match(text, position)
        separator = _SEPARATOR.match(text, position) if depth == 0 else None
        if separator:
            parts.append(text[start:position])
            start = position = separator.end()
        elif bracket:
            depth += 1 if bracket.group()[-1] in "([{" else -1
            position = bracket.end()
        else:
            position += 1
    parts.append(text[start:])
    return [part.strip().strip("$").strip() for part in parts if part.strip().strip("$").strip()]
