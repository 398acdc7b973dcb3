"""The grader of multiple choice: the letter that a completion gives, or the option's own words.

Nothing is guessed: a completion without an answer is wrong. The pronoun I and the article a are no
letters, although both are options of a question with ten.
"""

import re
from collections.abc import Mapping, Sequence

from megatron_opd.contracts.rows import Verdict
from megatron_opd.contracts.suites import Answer, Asked
from megatron_opd.verify.answer import content_of, final_answer
from megatron_opd.verify.graders.reasoning import conclusion, no_answer

RULES = "2"  # of this grader; another number is another grader
_TAIL = 4000  # characters in which a statement without a box is looked for
_TEXT = re.compile(
    r"\\(?:text|textbf|textit|mathrm|mathbf|mathit|operatorname|rm|bf)\s*\{([^{}]*)\}"
)
_LETTER = re.compile(
    r"(?:(?:the\s+)?(?:correct\s+)?(?:option|answer|choice)\s*(?:is|:)?\s*)?"
    r"[\[(]?\s*([A-Za-z])\s*(?:[\])]|[.:])?(?P<rest>(?<=[\]).:])\s.*)?",
    re.DOTALL | re.IGNORECASE,
)
# "answer is (B)", "ANSWER: B", "the correct option is **B**"; what must follow a bare letter is
# checked apart.
_STATED = re.compile(
    r"\b(?:answer|option|choice)\b[\s*_]*(?:is|:|=)[\s*_:]*"
    r"(?:(?:the\s+)?(?:correct\s+)?(?:option|choice|answer)\s*(?:is)?[\s*_:]*)?"
    r"(?:\$?\\(?:text|textbf|mathrm|mathbf)\{\s*)?"
    r"(?:[(\[]\s*(?P<enclosed>[A-Za-z])\s*[)\]]|(?P<bare>[A-Za-z])(?![\w']))",
    re.IGNORECASE,
)
# What follows a letter and no pronoun or article: the end of the line, or of the clause.
_BEHIND = re.compile(
    r"[\s*_}$]*(?:$|[.,;:)\]!?\n]|(?:because|since|as|for|and|with|which|based|due|given)\b)"
)
_ALONE = re.compile(r"[\s*_>#]*[\[(]?([A-Z])[\])]?[\s*_.:]*")


class ChoiceGrader:
    """Judges which option a completion chooses."""

    versions: Mapping[str, str] = {"rules": RULES}

    def grade(self, answers: Sequence[Answer]) -> list[Verdict]:
        """The verdicts in their order. Reasons: correct, wrong, no_answer, truncated."""
        return [_verdict(answer) for answer in answers]


def _verdict(answer: Answer) -> Verdict:
    text = conclusion(answer)
    chosen = None if text is None else chosen_option(text, answer.asked, cut=answer.truncated)
    if chosen is None:
        return Verdict(0.0, False, no_answer(answer))
    right = chosen == answer.asked.gold
    return Verdict(float(right), right, "correct" if right else "wrong", chosen)


def chosen_option(text: str, asked: Asked, *, cut: bool = False) -> str | None:
    """The letter that a text chooses, or what stands in its last box where that is no option.

    None where it chooses nothing. With `cut`, the last line may not be whole and is not read.
    """
    options = [asked.question.options[place] for place in asked.order]
    letters = [chr(ord("A") + number) for number in range(len(options))]
    if boxed := final_answer(text):
        return _in_box(content_of(boxed), letters, options)
    if "\\boxed" in text:
        return None  # a box that is empty or never closed, as in mathematics
    tail = text[-_TAIL:]
    stated = [match for match in _STATED.finditer(tail) if _is_letter(tail, match, letters)]
    if stated:
        return (stated[-1]["enclosed"] or stated[-1]["bare"]).upper()
    lines = [line for line in tail.splitlines() if line.strip()]
    if cut or not lines:
        return None
    chosen = _in_line(lines[-1], letters, options)
    before = _in_line(lines[-2], letters, options) if len(lines) > 1 else None
    # the options said again end with the last one, which nobody chose
    return None if before and before != chosen else chosen


def _in_box(content: str, letters: Sequence[str], options: Sequence[str]) -> str:
    plain = _plain(content)
    match = _LETTER.fullmatch(plain)
    if match and match[1].upper() in letters:
        return match[1].upper()
    same = [
        letter
        for letter, option in zip(letters, options, strict=True)
        if _plain(option).casefold() == plain.casefold()
    ]
    return same[0] if len(same) == 1 else content


def _in_line(line: str, letters: Sequence[str], options: Sequence[str]) -> str | None:
    """The letter of a last line that is a letter, or an option as it was shown."""
    if (match := _ALONE.fullmatch(line)) and match[1] in letters:
        return match[1]
    plain = _plain(line.strip(" *_")).casefold()
    for letter, option in zip(letters, options, strict=True):
        words = _plain(option).casefold()
        if plain in (f"{letter.lower()}. {words}", f"{letter.lower()}) {words}"):
            return letter
    return None


def _is_letter(text: str, match: re.Match[str], letters: Sequence[str]) -> bool:
    """True for an option's letter; I and A only where no sentence goes on, small letters only in
    brackets or at the end of a line that a colon begins."""
    if match["enclosed"]:
        return match["enclosed"].upper() in letters
    letter = match["bare"]
    if letter.upper() not in letters:
        return False
    behind = _BEHIND.match(text, match.end())
    if letter.islower():
        rest = text[match.end() :].partition("\n")[0]
        return ":" in match.group() and not rest.strip(" *_.)")
    return behind is not None or letter not in "AI"


def _plain(text: str) -> str:
    """The text without LaTeX's text commands, dollars, Markdown and doubled spaces."""
    for _ in range(2):  # \textbf{(\text{B})}
        text = _TEXT.sub(r"\1", text)
    text = text.replace("\\ ", " ").replace("~", " ").replace("$", "").strip(" *_\n\t")
    return " ".join(text.removesuffix(".").split()) if len(text) > 2 else text
