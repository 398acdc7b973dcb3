"""Answers that are numbers or words, compared without computer algebra, exactly and fast."""

import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from math import floor, log10

DECIMALS = 6  # places to which decimals are compared, as in math-verify
SIGNIFICANT_DIGITS = 4  # digits that are compared of numbers smaller than that
_LONGEST = 200  # characters of a number or of words

_SPACING = re.compile(r"\\[,;:! ]|\\q?quad(?![a-zA-Z])|[~\u00a0\u2009\u202f]")
# Unicode characters that LaTeX writes in ASCII.
_ASCII = str.maketrans(
    {
        "\u2212": "-",  # minus sign
        "\u2013": "-",  # en dash
        "\u00d7": r"\times ",
        "\u00b7": r"\cdot ",
        "\u00f7": "/",
        "\u2044": "/",  # fraction slash
        "\u03c0": r"\pi ",
        "\u221e": r"\infty ",
        "\u222a": r"\cup ",
        "\u2264": r"\le ",
        "\u2265": r"\ge ",
        "\u00b0": r"^\circ ",
        "\u00bd": r"\frac{1}{2}",
        "\u00bc": r"\frac{1}{4}",
        "\u00be": r"\frac{3}{4}",
        "\u00b2": "^2",
        "\u00b3": "^3",
    }
)
# 1,000 or 1{,}000 or 1 000: groups of three digits.
_GROUPED = re.compile(r"(?<![\d.,])([1-9]\d{0,2})((?:(?:\{,\}|,|[ ])\d{3})+)(?![\d,])")
_MANTISSA = r"(?P<mantissa>\d+\.?\d*|\.\d+)"
_POWER = r"10\s*\^\s*(?:\{\s*(?P<braced>[+-]?\d{1,3})\s*\}|(?P<bare>\d{1,3}|[+-]\d{1,3}))"
_NUMBER = re.compile(
    rf"(?P<sign>[+-]?)\s*(?:10\s*\^\s*(?:\{{\s*(?P<alone>[+-]?\d{{1,3}})\s*\}}|(?P<digit>\d))"
    rf"|{_MANTISSA}(?:[eE](?P<e>[+-]?\d{{1,3}})|\s*(?:\\times|\\cdot|\*|x)\s*{_POWER})?)\s*(?P<percent>\\?%)?"
)
_RATIO = re.compile(
    r"([+-]?)\s*(?:\\[dtc]?frac\s*\{\s*([+-]?\d+)\s*\}\s*\{\s*([+-]?\d+)\s*\}|(\d+)\s*/\s*(\d+))"
)
UNIT = r"(?:[cdmk]m|[mk]g|m[lLs]|ft|lb|in|oz|yd|hr|min|sec|mph|kmh|gal|mi|Hz|kW|eV|mol)"
# 12 cm^2, 5 m/s, 3\text{ apples}; a single letter that is not set off may be a variable.
_UNIT_SUFFIX = re.compile(
    rf"(?<=[\d.}}%])(?:\s*\\(?:text|mathrm|mbox)\s*\{{(?P<text>[^{{}}]*)\}}|\s*{UNIT}|\s+[mgshLlJNVWK])"
    rf"(?:\s*/\s*(?:{UNIT}|[smhL]))?(?:\s*\^\s*\{{?-?[1-4]\}}?)?$"
)
_CURRENCY = re.compile(r"^([+-]?)\s*(?:\\?\$|€|£|¥)\s*(?=[\d.+-])")

NUMBER_WORDS = re.compile(r"\b(?:hundred|thousand|million|billion|trillion|dozen)\b", re.IGNORECASE)
_NOT_A_UNIT = re.compile(NUMBER_WORDS.pattern + r"|\b(?:percent|pi)\b|%", re.IGNORECASE)
_TEXT = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it|sf)|mbox|operatorname)\s*\{([^{}]*)\}"
)
_WORDS = re.compile(r"[^\W\d_]+(?:[\s'\u2019-]+[^\W\d_]+)*")
_CHOICE = re.compile(r"\(?([A-J])(?:\)|[.:])(?:\s.*)?|\[([A-J])\].*", re.DOTALL)
_SCIENTIFIC = re.compile(
    rf"(?<![A-Za-z\d.\\_^]){_MANTISSA}(?:[eE](?P<e>[+-]?\d{{1,3}})|\s*(?:\\times|\\cdot|\*)\s*{_POWER})(?![\w.^{{!])"
)


@dataclass(frozen=True)
class Number:
    """The value of a number, and how it was written."""

    value: Fraction
    is_decimal: bool = False  # written with a point or as a power of ten: compared at a precision
    is_percent: bool = False


def compare_plain(content: str, gold: str) -> str | None:
    """ "correct" or "wrong" when both are numbers, or both are words; None needs computer algebra.

    Words are compared as text, in any case: as products of letters, `on` would equal `no`.
    """
    if max(len(content), len(gold)) > _LONGEST:
        return None
    number = read_number(content)
    gold_number = read_number(gold)
    if number and gold_number:
        return "correct" if _equal(number, gold_number) else "wrong"
    words = _read_words(content)
    gold_words = _read_words(gold)
    if gold_words and words:
        return "correct" if words == gold_words else "wrong"
    if gold_words and (choice := _CHOICE.fullmatch(_without_text_commands(content))):
        return "correct" if (choice[1] or choice[2]).casefold() == gold_words else "wrong"
    return None


def read_number(text: str) -> Number | None:
    r"""The number that a text is, such as `1{,}000.5`, `\$2`, `4.5 \times 10^{33}`, `12\%`, `3/4`.

    None if it is none.
    """
    text = _SPACING.sub(" ", in_ascii(text)).strip().removesuffix(".").strip("$ ")
    text = _CURRENCY.sub(r"\1", text)
    text = _GROUPED.sub(lambda match: match[1] + re.sub(r"\D", "", match[2]), text)
    unit = _UNIT_SUFFIX.search(text)
    if unit and not _NOT_A_UNIT.search(unit["text"] or ""):
        text = text[: unit.start()]
    if match := _NUMBER.fullmatch(text):
        exponents = [match[name] for name in ("e", "braced", "bare", "alone", "digit")]
        exponent = next(filter(None, exponents), "0")
        mantissa = match["mantissa"] or "1"
        value = Fraction(mantissa) * Fraction(10) ** int(exponent)
        is_decimal = "." in mantissa or int(exponent) < 0
        return Number(-value if match["sign"] == "-" else value, is_decimal, bool(match["percent"]))
    if match := _RATIO.fullmatch(text):
        denominator = int(match[3] or match[5])
        if denominator:
            value = Fraction(int(match[2] or match[4]), denominator)
            return Number(-value if match[1] == "-" else value)
    return None


def in_ascii(text: str) -> str:
    """The text with Unicode's minus signs, fractions, powers and operators as LaTeX."""
    return text if text.isascii() else text.translate(_ASCII)


def decimals_to_compare(*texts: str) -> int:
    """The number of places to compare the numbers of these texts to; a tiny one needs more."""
    smallest = min((power for text in texts for power in _magnitudes(text)), default=0)
    return max(DECIMALS, SIGNIFICANT_DIGITS - 1 - smallest)


def in_digits(text: str) -> str:
    r"""The text with `4.5e3` and `4.5 \times 10^{3}` as `4500`.

    In LaTeX the first has Euler's number, and the second is a product.
    """

    def digits(match: re.Match[str]) -> str:
        exponent = match["e"] or match["braced"] or match["bare"]
        return f"{Decimal(match['mantissa']) * Decimal(10) ** int(exponent):f}"

    return _SCIENTIFIC.sub(digits, text)


def _magnitudes(text: str) -> list[int]:
    """The power of ten of every number in a text except zeros."""
    if len(text) > 10 * _LONGEST:
        return []
    numbers = (read_number(match.group().strip()) for match in _NUMBER.finditer(text))
    return [_magnitude(number.value) for number in numbers if number and number.value]


def _magnitude(value: Fraction) -> int:
    """floor(log10 |value|), also for numbers beyond the range of a float."""
    size = abs(value)
    return floor(log10(size.numerator) - log10(size.denominator))


def _equal(a: Number, b: Number) -> bool:
    """True for equal numbers; `50%` equals both 50 and 0.5, since questions fix the unit."""
    values = {a.value, a.value / 100} if a.is_percent and not b.is_percent else {a.value}
    golds = {b.value, b.value / 100} if b.is_percent and not a.is_percent else {b.value}
    is_decimal = a.is_decimal or b.is_decimal
    return any(_close(x, y) if is_decimal else x == y for x in values for y in golds)


def _close(a: Fraction, b: Fraction) -> bool:
    smallest = min((_magnitude(value) for value in (a, b) if value), default=0)
    decimals = max(DECIMALS, SIGNIFICANT_DIGITS - 1 - smallest)
    return round(a, decimals) == round(b, decimals)


def _read_words(text: str) -> str | None:
    text = _without_text_commands(text)
    if len(text) > 2 and (text[0] + text[-1]) in ("()", "[]"):
        text = text[1:-1].strip()
    return " ".join(text.casefold().split()) if _WORDS.fullmatch(text) else None


def _without_text_commands(text: str) -> str:
    plain = _SPACING.sub(" ", _TEXT.sub(r"\1", text)).strip().strip("$")
    return plain.rstrip(".,)" if "(" not in text else ".,").strip()
