"""The keys of rewards: what grades a completion, and what their sum is made of."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Literal

from annotated_types import Gt, Le

from megatron_opd.contracts.ranges import Gibibytes, NonNegativeInt, PositiveInt, Seconds

AnswerPlace = Literal["boxed", "boxed_or_last"]
RewardKind = Literal["math", "choice", "code", "format", "python"]
# Reasoning between tags, then an answer.
REASONING_THEN_ANSWER = r"\s*<think>.*?</think>\s*\S.*"


@dataclass(frozen=True, kw_only=True)
class MathReward:
    """1 for an answer that math-verify finds equal to the gold answer."""

    kind: Literal["math"] = "math"
    weight: float = 1.0  # in the sum; 0: measured alone
    sources: list[str] = field(default_factory=list)  # of the rows it grades; []: all
    # a box or <answer> tag; or_last: else the end of the text
    answer: AnswerPlace = "boxed"


@dataclass(frozen=True, kw_only=True)
class ChoiceReward:
    """1 for the letter of the right option, or for the option's own words."""

    kind: Literal["choice"]
    weight: float = 1.0  # in the sum; 0: measured alone
    sources: list[str] = field(default_factory=list)  # of the rows it grades; []: all
    # of the rows, a list of texts; a row without it has options A to J, of unknown words
    options_column: str = "options"


@dataclass(frozen=True, kw_only=True)
class CodeReward:
    """1 for a program that passes all tests of its row, each in a process of a sandbox."""

    kind: Literal["code"]
    weight: float = 1.0  # in the sum; 0: measured alone
    sources: list[str] = field(default_factory=list)  # of the rows it grades; []: all
    cpu_seconds: Seconds = 6.0  # of a test
    wall_seconds: Seconds = 24.0  # of a test, for a busy machine
    memory_gib: Gibibytes = 2.0  # of a test's address space
    # tests at a time; 0: one on every core, shared by a machine's ranks
    workers: NonNegativeInt = 0
    packages: list[str] = field(default_factory=lambda: ["numpy"])  # that a program may import

    @property
    def grading(self) -> Mapping[str, object]:
        """The options of the benchmarks' grader."""
        others = ("kind", "weight", "sources")
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in others}


@dataclass(frozen=True, kw_only=True)
class FormatReward:
    """1 for a completion that a regular expression matches from its first character to its last."""

    kind: Literal["format"]
    weight: float = 1.0  # in the sum; 0: measured alone
    sources: list[str] = field(default_factory=list)  # of the rows it grades; []: all
    # Python's, in which a dot is any character; a <think> that ends the prompt is put in front
    pattern: str = REASONING_THEN_ANSWER


@dataclass(frozen=True, kw_only=True)
class PythonReward:
    """What a function of yours returns for (prompt, completion, row, tokens)."""

    kind: Literal["python"]
    python: str  # "module:function", or "file.py:function"
    weight: float = 1.0  # in the sum; 0: measured alone
    sources: list[str] = field(default_factory=list)  # of the rows it grades; []: all


Reward = MathReward | ChoiceReward | CodeReward | FormatReward | PythonReward


def grades(reward: Reward, source: str) -> bool:
    """True where a reward grades the rows of a source."""
    return not reward.sources or source in reward.sources


@dataclass(frozen=True)
class LengthPenalty:
    """DAPO's soft overlong punishment: 0, then down to -weight at the longest completion."""

    # the last part of rollout.max_completion_tokens, over which the reward falls
    overlong: Annotated[float, Gt(0), Le(1)] = 0.2
    weight: Annotated[float, Gt(0)] = 1.0  # that the longest completion loses


@dataclass(frozen=True)
class RewardConfig:
    """What grades completions: one reward, or several in a weighted sum. See docs/rewards.md."""

    # what grades, where there is one reward: the kinds of reward.rewards, with their defaults
    kind: RewardKind = "math"
    python: str | None = None  # kind python: "module:function" of yours, or "file.py:function"
    # by name, in the place of kind: their weighted sum; the first that grades a row says whether
    # it is right. null leaves one of the base out
    rewards: dict[str, Reward | None] = field(default_factory=dict)
    length_penalty: LengthPenalty | None = None  # of long completions; null: none
    # "module:function" of (completion, gold answer) in math-verify's place -> a number from 0,
    # wrong, to 1, right, or whether it is right
    function: str | None = None
    # kind math: a box or <answer> tag; or_last: else the end of the text
    answer: AnswerPlace = "boxed"
    timeout_seconds: Seconds = 5.0  # of one answer
    # of a step's answers that hit their limit: what they use shortens the next's
    budget_seconds: Seconds = 30.0
    max_characters: PositiveInt = 2000  # a final answer longer than this scores 0 unparsed
    workers: PositiveInt = 1  # per training process

    @property
    def graded(self) -> dict[str, Reward]:
        """The rewards by name; {} with `function`, which is none of these."""
        chosen = {name: reward for name, reward in self.rewards.items() if reward}
        if chosen or self.function:
            return chosen
        match self.kind:
            case "math":
                return {"math": MathReward(answer=self.answer)}
            case "choice":
                return {"choice": ChoiceReward(kind="choice")}
            case "code":
                return {"code": CodeReward(kind="code")}
            case "format":
                return {"format": FormatReward(kind="format")}
            case "python":
                return {"python": PythonReward(kind="python", python=self.python or "")}

    @property
    def is_plain(self) -> bool:
        """True for one reward of gold answers: math-verify's, or that of `function`."""
        several = bool(self.rewards) or self.length_penalty is not None
        return not several and (bool(self.function) or self.kind == "math")

    @property
    def needs_answers(self) -> bool:
        """True where every row must have a gold answer."""
        return all(isinstance(reward, MathReward | ChoiceReward) for reward in self.graded.values())

    @property
    def reads_rows(self) -> bool:
        """True where a reward reads more of a data file's row than its gold answer."""
        return any(not isinstance(reward, MathReward) for reward in self.graded.values())
