"""What a suite is: where its data are from, how its rows become questions, what it expects."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from megatron_opd.contracts.suites import GraderName

# How rows become questions: a form of suites/forms.py.
FormName = Literal[
    "math", "olympiad", "choice", "arc", "gpqa", "mmlu_pro", "redux", "instructions", "code"
]


@dataclass(frozen=True)
class Only:
    """The rows that belong to a suite: those whose column has a value, a part or a date."""

    column: str
    equals: str | None = None
    contains: str | None = None
    since: str | None = None  # dates as YYYY-MM-DD, both within
    until: str | None = None
    optional: bool = False  # data without the column are taken whole

    def keeps(self, value: object) -> bool:
        text = str(value)
        return (
            (self.equals is None or text == self.equals)
            and (self.contains is None or self.contains in text)
            and (self.since is None or text[: len(self.since)] >= self.since)
            and (self.until is None or text[: len(self.until)] <= self.until)
        )

    def __str__(self) -> str:
        texts = {
            "=": self.equals, " contains ": self.contains, ">=": self.since, "<=": self.until
        }  # fmt: skip
        return ", ".join(f"{self.column}{sign}{text}" for sign, text in texts.items() if text)


@dataclass(frozen=True)
class Suite:
    """A named evaluation."""

    name: str
    title: str
    hub: str  # the data's id on the Hugging Face Hub; "" for a user's own
    # of its files, by preference: all that match the first pattern that any matches; `*` matches
    # folders too
    patterns: tuple[str, ...]
    form: FormName
    grader: GraderName
    licence: str  # of the data, as its page says
    questions: int | None = None  # that are expected; None: any number
    only: Only | None = None
    columns: Mapping[str, str] = field(default_factory=dict)  # by field, where they are the user's
    grading: Mapping[str, object] = field(default_factory=dict)  # the grader's options
    gated: bool = False  # to be had with a token and accepted terms alone
    note: str = ""  # what a reader of its numbers must know
    own_data: str = ""  # how a user names other data: an option, or a recipe's key
