"""The keys of data: the rows that are trained on and held out, and the prompts made of them."""

import datetime
from dataclasses import dataclass, field
from typing import Literal

from megatron_opd.contracts.ranges import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)


@dataclass(frozen=True)
class TemplateConfig:
    """The text that the model reads, made of a problem."""

    kind: Literal["chat", "raw"] = "chat"  # the tokenizer's chat template, or `text` alone
    # chat: for rows without a system message of their own; "tgpo" names the built-in one
    system: str | None = None
    text: str = "{problem}"  # raw: the whole prompt; chat: the user's message
    # appended after the template: the first characters of the response, such as "<think>\n"
    prefill: str = ""
    # chat: what the template reads beside the messages, such as {enable_thinking: false}
    chat_template_kwargs: dict[str, str | int | float | bool] = field(default_factory=dict)
    chat_template: str | None = None  # chat: a file with the template; null: the tokenizer's own
    # what a chat template takes for today; null: the day on which the run starts
    date: datetime.date | None = None


@dataclass(frozen=True)
class HeldoutConfig:
    """A held-out set with columns of its own; a path instead has the training data's columns."""

    path: str | list[str]  # as data.train
    problem_column: str = "auto"  # as data.problem_column, of this set
    answer_column: str = "auto"  # as data.answer_column, of this set


@dataclass(frozen=True)
class HeldoutSetConfig:
    """A further held-out set, whose metrics are eval/set/NAME/..."""

    path: str | list[str]  # as data.train
    problem_column: str | None = None  # null: data.problem_column
    answer_column: str | None = None  # null: data.answer_column
    source_column: str | None = None  # null: data.source_column
    source: str | None = None  # of all its rows, in the place of a column
    template: TemplateConfig | None = None  # null: data.template
    num_prompts: NonNegativeInt | None = None  # null: eval.num_prompts
    samples_per_prompt: PositiveInt | None = None  # null: eval.samples_per_prompt
    temperature: NonNegativeFloat | None = None  # null: eval.temperature


@dataclass(frozen=True)
class MixturePartConfig:
    """A part of the training data. Its rows are of the source that its name says."""

    path: str | list[str]  # as data.train
    weight: PositiveFloat = 1.0  # of its share of the prompts, whatever its size
    problem_column: str | None = None  # null: data.problem_column
    answer_column: str | None = None  # null: data.answer_column
    trace_column: str | None = None  # null: data.trace_column


@dataclass(frozen=True)
class CurriculumConfig:
    """An order of the training rows: from the lowest number of a column to the highest."""

    column: str  # of numbers, such as a level of difficulty
    epochs: PositiveInt = 1  # the first N; later ones are as without a curriculum


@dataclass(frozen=True)
class DataConfig:
    """Rows with a problem and an answer: .jsonl(.gz), .json(.gz) or .parquet. See docs/data.md."""

    # a file, a pattern such as data/train-*.parquet, or a list of them; none with an environment
    train: str | list[str] = field(default_factory=list)
    # rows that are never trained on, for eval: paths, or with columns of their own
    heldout: str | list[str] | HeldoutConfig | None = None
    problem_column: str = "auto"  # prompt | problem | question | messages | conversations
    answer_column: str = "auto"  # answer | reward_model.ground_truth | solution
    # response | generations[0] ...; read by methods that learn from traces
    trace_column: str = "auto"
    # says where a row is from, for gates and rewards; null: all rows are of one source
    source_column: str | None = None
    template: TemplateConfig = TemplateConfig()  # how a row becomes the text that the model reads
    # null: as many as max_sequence_length leaves, 1 less than it
    max_prompt_tokens: PositiveInt | None = None
    # rows that are too long; dropped ones are counted in a warning
    long_prompts: Literal["error", "drop"] = "error"
    # rows that cannot be read; dropped ones are counted in a warning
    bad_rows: Literal["error", "drop"] = "error"
    shuffle: bool = True  # an order drawn from the seed; false: that of the files
    # rows of one number are in the order that shuffle says; null: none
    curriculum: CurriculumConfig | None = None
    # parts by name, in the place of train: a step's prompts are drawn from them by their weights.
    # null leaves one of the base out
    mixture: dict[str, MixturePartConfig | None] = field(default_factory=dict)
    # further held-out sets by name; null leaves one of the base out
    heldout_sets: dict[str, HeldoutSetConfig | None] = field(default_factory=dict)
    # of each file; a run writes it into its config.yaml
    sha256: dict[str, str] = field(default_factory=dict)

    @property
    def heldout_set(self) -> HeldoutConfig | None:
        """The held-out set with its columns."""
        if self.heldout is None or isinstance(self.heldout, HeldoutConfig):
            return self.heldout
        return HeldoutConfig(self.heldout, self.problem_column, self.answer_column)

    @property
    def parts(self) -> dict[str, MixturePartConfig]:
        """The parts of the mixture; {} without one."""
        return {name: part for name, part in self.mixture.items() if part}

    @property
    def sets(self) -> dict[str, HeldoutSetConfig]:
        """The further held-out sets."""
        return {name: one for name, one in self.heldout_sets.items() if one}

    @property
    def files(self) -> dict[str, str | list[str]]:
        """The paths and patterns of the data, by the recipe's key of them."""
        files = {"data.train": self.train} if self.train else {}
        files |= {f"data.mixture.{name}": part.path for name, part in self.parts.items()}
        if self.heldout_set:
            files["data.heldout"] = self.heldout_set.path
        return files | {f"data.heldout_sets.{name}": one.path for name, one in self.sets.items()}

    @property
    def templates(self) -> list[str]:
        """The files of chat templates."""
        templates = [self.template, *(one.template for one in self.sets.values())]
        return [one.chat_template for one in templates if one and one.chat_template]

    @property
    def paths(self) -> list[str]:
        """Every path and pattern, as the recipe writes them."""
        paths = [path for one in self.files.values() for path in _listed(one)]
        return paths + self.templates


def _listed(paths: str | list[str]) -> list[str]:
    return [paths] if isinstance(paths, str) else paths
