"""The answer in a completion, and the value of a gold answer, in time linear in the text."""

import re
from typing import Literal

TAIL_CHARACTERS = 1000  # of a completion without a box: its answer for `boxed_or_last`

AnswerMode = Literal["boxed", "boxed_or_last"]

_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?:\{|(?<=\s)(?P<word>[^\s{}$\\]+))")
_BRACE_OR_ESCAPE = re.compile(r"\\.|[{}]", re.DOTALL)
# The text between two boxes that are one answer: "\boxed{3}$ and $y=\boxed{4}".
_JOINED = re.compile(
    r"[\s$]*(?:,|;|,?\s*(?:\\text\{\s*)?(?:and|or)\b(?:\s*\})?)[\s$]*(?:\w+\s*=)?[\s$]*"
)
_LONGEST_JOINT = 60  # characters
_OPENING_TAG = "<answer>"
_CLOSING_TAG = "</answer>"
_CLOSING_THINK = "</think>"

_STATEMENT = re.compile(r"\banswer\b\s*(?:is|are|[:=])\s*:?\s*", re.IGNORECASE)
_GSM8K_MARK = "####"
_DECORATION = " \t\r\n*`"  # Markdown around an answer
_LATEX = re.compile(r"\\[a-zA-Z]+|[\^_{}]")
_COMMAND = re.compile(r"\\[a-zA-Z]+\s*(?:\{[^{}]*\})?")
_WORD = re.compile(r"[^\W\d_]{2,}")
_NUMBER = r"[-+]?\$?[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:\s*/\s*\d+)?(?:\s*%|\s+percent\b)?"
# The two ways in which one number and words are a number: "12 square metres", "She has 12 dollars."
_COUNTED = re.compile(rf"(?P<number>{_NUMBER})(?:\s+[^\W\d_]{{2,}}){{0,3}}")
_VERB = r"(?:\b(?:is|are|was|were|has|have|equals?)|=)"
_STATED = re.compile(rf"[^\d=]*{_VERB}\s+(?P<number>{_NUMBER})(?:\s+[^\W\d_]+){{0,3}}")
_INLINE = re.compile(r"\$(?P<number>[^$]+)\$")
_NOT_UNITS = re.compile(
    r"\b(?:and|or|to|not|no|than|least|most|more|less|except|hundred|thousand|million|billion|trillion|dozen|pi)\b",
    re.I,
)
_LONGEST_SENTENCE = 300  # characters of a gold answer in words; a longer one is no answer
_NO_WORDS = frozenset(
    (
        "sin",
        "cos",
        "tan",
        "cot",
        "sec",
        "csc",
        "log",
        "exp",
        "sqrt",
        "and",
        "mod",
        "max",
        "min",
        "gcd",
        "lcm",
        "for",
    )
)


def final_answer(text: str, mode: AnswerMode = "boxed", *, truncated: bool = False) -> str | None:
    r"""The answer of a completion: its last `\boxed{...}` or `<answer>...</answer>`, else None.

    Boxes joined by a comma, "and" or "or" are one answer. A last box that is empty or never closed
    is no answer, and no earlier box or number replaces it. `boxed_or_last` takes the end of a
    completion without a box, unless it was `truncated` by the token limit.
    """
    boxes = list(_BOX.finditer(text))
    tag_end = text.rfind(_CLOSING_TAG)
    tag = text.rfind(_OPENING_TAG, 0, max(tag_end, 0))
    if tag >= 0 and not (boxes and boxes[-1].start() > tag):
        content = read_statement(text[tag + len(_OPENING_TAG) : tag_end])
        return boxed(content) if content else None
    if boxes:
        contents = _joined_contents(text, boxes)
        return boxed(", ".join(contents)) if contents else None
    if mode == "boxed" or truncated:
        return None
    return text.rpartition(_CLOSING_THINK)[2][-TAIL_CHARACTERS:].strip() or None


def read_gold(gold: str) -> str | None:
    """The value of a gold answer as bare LaTeX, without box, dollars, Markdown or sentence.

    None when nothing can be compared with it: it is empty, its braces do not match, or it is a
    sentence with several numbers or with none that it states.
    """
    if _BOX.search(gold) or _CLOSING_TAG in gold:
        answer = final_answer(gold)
        return answer and content_of(answer)
    return read_statement(gold)


def read_statement(text: str) -> str | None:
    """The value that a short text states: "The answer is $5$." and "**5**" state 5. Else None."""
    text = text.rpartition(_GSM8K_MARK)[2]
    stated = max(_STATEMENT.finditer(text), key=re.Match.end, default=None)
    text = _undecorated(text[stated.end() :] if stated else text)
    if not text or not _braces_match(text):
        return None
    return _value_in_words(text) if re.search(r"\d", text) else text


def boxed(content: str) -> str:
    r"""The content in a `\boxed{...}`."""
    return f"\\boxed{{{content}}}"


def content_of(answer: str) -> str:
    """The content of the box that `final_answer` returns, or the whole tail."""
    content = answer.removeprefix("\\boxed{").removesuffix("}")
    return content if boxed(content) == answer else answer


def _joined_contents(text: str, boxes: list[re.Match[str]]) -> list[str] | None:
    """The contents of the last box and of boxes joined to it, in order, without repetition."""
    contents: list[str] = []
    next_start = len(text)
    for box in reversed(boxes):
        content, end = _box_content(text, box, next_start)
        if contents and not (content and _is_joint(text, end, next_start)):
            break
        if not content:
            return None
        contents.append(content)
        next_start = box.start()
    return list(dict.fromkeys(reversed(contents)))


def _is_joint(text: str, start: int, stop: int) -> bool:
    return stop - start <= _LONGEST_JOINT and _JOINED.fullmatch(text, start, stop) is not None


def _box_content(text: str, box: re.Match[str], stop: int) -> tuple[str | None, int]:
    """The content of a box and its end; (None, stop) when it is not closed before `stop`."""
    if box["word"]:
        return box["word"].rstrip(".,;"), box.end()
    depth = 1
    for token in _BRACE_OR_ESCAPE.finditer(text, box.end(), stop):
        depth += {"{": 1, "}": -1}.get(token.group(), 0)
        if depth == 0:
            return text[box.end() : token.start()].strip(), token.end()
    return None, stop


def _undecorated(text: str) -> str:
    """The text without Markdown, dollars around the whole and a full stop."""
    text = text.strip(_DECORATION)
    if not text.endswith("\\right."):
        text = text.rstrip(".").strip(_DECORATION)
    for opening, closing in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        inner = text[len(opening) : -len(closing)]
        enclosed = text.startswith(opening) and text.endswith(closing) and opening not in inner
        if enclosed and inner.strip():
            return inner.strip(_DECORATION).removesuffix(".")
    return text


def _value_in_words(text: str) -> str | None:
    """The value of a text with digits: a formula itself, or a sentence's number. Else None."""
    around = _COMMAND.sub(" ", _INLINE.sub(" ", text))
    words = [word for word in _WORD.findall(around) if word.lower() not in _NO_WORDS]
    if len(max(words, key=len, default="")) < 3 or not re.search(r"\s", text):
        return text
    if len(text) > _LONGEST_SENTENCE or _NOT_UNITS.search(around):
        return None
    inline = _INLINE.findall(text)
    if len(inline) == 1 and not re.search(r"\d", around):
        return inline[0].strip()
    if _LATEX.search(text):
        return text
    match = _COUNTED.fullmatch(text) or _STATED.fullmatch(text)
    return match["number"].strip() if match else None


def _braces_match(text: str) -> bool:
    depth = 0
    for token in _BRACE_OR_ESCAPE.finditer(text):
        depth += {"{": 1, "}": -1}.get(token.group(), 0)
        if depth < 0:
            return False
    return depth == 0
