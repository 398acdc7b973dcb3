"""Questions of benchmark suites, how they are asked, and what became of the answers. No torch.

A *suite* is a named evaluation: its data, and how they are asked and graded. Its *protocol* is all
that must be the same for two results to be comparable.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from megatron_opd.contracts.rows import Verdict

REASONING_TAG = "<think>"  # opens a model's reasoning
GraderName = Literal["math", "math_legacy", "choice", "instructions", "code"]


@dataclass(frozen=True)
class SuiteProtocol:
    """How a suite is asked and graded. It is stored with every result."""

    name: str  # "official", "luffy", "tropd", or "own" for a user's suite
    samples: int  # of every question
    temperature: float  # 0 is greedy
    top_p: float
    max_tokens: int  # of a completion
    # the user's words: a text with {problem}, {options} where there are some, and {form}: how a
    # program is to be written
    prompt: str
    system: str | None = None  # the system message; None: the template's own
    prefill: str | None = None  # with which a response is opened; None: the template's own
    # the order of options: the data's, or drawn anew for every question or every sample
    shuffle: Literal["none", "question", "sample"] = "none"
    grader: GraderName = "math"
    grading: Mapping[str, object] = field(default_factory=dict)  # the grader's options
    note: str = ""  # what the paper does not state, and what stands here instead


@dataclass(frozen=True)
class Question:
    """A question of a suite."""

    key: str  # names it in results, wherever it stands: the data's id, or a digest of its text
    text: str  # as in the data
    gold: str  # as in the data: an answer or a letter; "" where a program decides
    options: tuple[str, ...] = ()  # to choose from, in the data's order
    group: str = ""  # its subject or level, for a table of its own
    details: Mapping[str, object] = field(default_factory=dict)  # what its grader reads beside


@dataclass(frozen=True)
class Asked:
    """A question as one sample reads it."""

    question: Question
    sample: int
    words: str  # what the user says
    gold: str  # for the options as they stand here
    order: tuple[int, ...] = ()  # the place in the data of every option, as they stand here

    @property
    def gold_place(self) -> int:
        """The place of the right option, from 0; -1 without options."""
        return ord(self.gold) - ord("A") if self.order else -1


@dataclass(frozen=True)
class Answer:
    """A completion, to be graded."""

    asked: Asked
    text: str
    truncated: bool  # by the limit of tokens
    opened: bool = False  # the prompt ends with the tag that opens the reasoning

    @classmethod
    def to(cls, prompt: str, asked: Asked, text: str, *, truncated: bool) -> "Answer":
        """A completion of a prompt, given as the text after the template."""
        return cls(asked, text, truncated, opened=prompt.rstrip().endswith(REASONING_TAG))


@dataclass(frozen=True)
class GradedSample:
    """A graded completion, as it is stored: a row of `samples.parquet`."""

    suite: str
    key: str
    group: str
    sample: int
    gold: str
    order: tuple[int, ...]
    gold_place: int
    prompt: str  # the text after the template
    text: str
    tokens: int  # of the completion
    truncated: bool
    verdict: Verdict


class Grader(Protocol):
    """Judges the answers to a suite's questions. Local to a process."""

    @property
    def versions(self) -> Mapping[str, str]:
        """The versions of what judges, by package; stored with the results."""

    def grade(self, answers: Sequence[Answer]) -> list[Verdict]:
        """The verdicts in their order. An answer never raises; RunError where no judge starts."""
