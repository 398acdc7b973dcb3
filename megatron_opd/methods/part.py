"""The base classes of the parts of a loss: a part describes itself. No torch.

A part is a frozen dataclass: its fields are the keys of a recipe. Everything else that the rest of
the system has to know of it is a method here: what it reads, when it is computed, its number per
token, what would make it useless. Nobody outside asks which part it is.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from megatron_opd.errors import ConfigError
from megatron_opd.methods.schedules import SignedWeight, Weight, check_weight

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_opd.methods.tokens import Tokens

When = Literal["before", "within"]

# How a term's tokens are averaged. "-norm" divides by rollout.max_completion_tokens in the place of
# the length.
Aggregate = Literal[
    "token-mean",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "token-sum",
]

# What a term is averaged over: its own tokens | the sum of its gates | every token of the
# responses, given ones too.
Denominator = Literal["tokens", "gated", "all"]


@dataclass(frozen=True)
class Needs:
    """The signals that parts, or a method, read. `a | b` is what both read together."""

    rollouts: bool = False  # the student samples (otherwise the data set's traces are the text)
    traces: bool = False  # the data set's responses, alone or mixed with samples
    rewards: bool = False
    data_sources: bool = False  # where the data says a task is from
    sampler: bool = False  # the sampler's own log-probabilities
    teacher: bool = False  # a forward pass of the teacher
    argmax: bool = False  # the student's log-probability of the teacher's most likely token
    topk: int = 0  # how many of the teacher's best ids
    teacher_head: bool = False  # the teacher's whole distribution, within the student's pass
    reference: bool = False  # the student as the run found it
    # a model trained beside the student, whose log-ratio to the reference is a reward
    process: bool = False
    student_pass: bool = False  # the student's logprobs and entropy before the step's first update

    def __or__(self, other: "Needs") -> "Needs":
        own = vars(self)
        added = vars(other)
        return Needs(**{name: max(own[name], added[name]) for name in own})


@dataclass(frozen=True)
class Around:
    """The recipe around a part, as far as its `check` may know it."""

    num_steps: int
    group_size: int  # completions of a task in a step, traces included
    traces_per_group: int
    updates_per_step: int
    pipeline_stages: int  # of student or teacher, whichever has more
    student_tp: int
    teacher_tp: int

    def refuse_split_vocabularies(self, key: str) -> None:
        """For what compares whole distributions. Raises ConfigError where a layout splits them so
        that one process cannot see both models' halves of a vocabulary."""
        if self.pipeline_stages > 1:
            raise ConfigError(
                f"teacher.layout: {key} compares whole distributions, which pipeline stages cannot "
                "yet"
            )
        if self.teacher_tp not in (1, self.student_tp):
            raise ConfigError(
                f"teacher.layout.tensor_model_parallel_size: {key} compares whole distributions: "
                "1, or the student's"
            )


@dataclass(frozen=True)
class Part(ABC):
    """One thing that a loss is made of. Subclasses are frozen dataclasses with a field `kind`."""

    formula: ClassVar[str]  # in the notation of docs/methods.md

    def needs(self) -> Needs:
        """The signals that it reads itself, without the parts in it."""
        return Needs()

    def when(self) -> When:
        """The moment of its number: before the update, or within it, moving with the student."""
        return "before"

    def teaches(self) -> bool:
        """True if the expected gradient of a term with it depends on the teacher's opinion.

        A number that is the same for all tokens that could stand at a place is a baseline, in the
        sense of REINFORCE: its expected gradient is 0, whatever the teacher says.
        """
        return False

    def check(self, key: str, around: Around) -> list[str]:
        """Warnings of keys without effect. Raises ConfigError that names `key` or one below it."""
        return []

    def check_vocabulary(self, key: str, vocab_size: int) -> None:  # noqa: B027 (few have one)
        """Raises ConfigError where no token of such a vocabulary would be left."""

    def fit(self, vocab_size: int) -> Self:
        """Itself for a vocabulary of that size: a top k beyond it is all of it."""
        return self


class GatePart(Part):
    """A factor of a token's loss, detached: how much it counts. Gates of a term are multiplied."""

    invert: bool = False  # of those from 0 to 1: 1 minus the number

    def contradicts(self, other: "GatePart") -> bool:
        """True if the other one counts exactly what this one leaves out."""
        same = vars(self) | {"invert": other.invert} == vars(other)
        return type(self) is type(other) and self.invert != other.invert and same

    @abstractmethod
    def value(self, tokens: "Tokens") -> "Tensor":
        """Its number before `invert`, [T], at least 0; bool or floating-point. Has no gradient."""


class CorrectionPart(Part):
    """A factor of a sampled token's loss, for sampler and trainer disagreeing on it."""

    @abstractmethod
    def value(self, tokens: "Tokens") -> "Tensor":
        """The weight, [T], before the update."""


class AdvantagePart(Part):
    """The worth of a sampled token. The weighted advantages of a term are added up."""

    weight: SignedWeight  # of its number in the sum of advantages
    last: ClassVar[bool] = False  # combined with the sum of all others
    # the same for all tokens that could stand at a place: alone, and without a gate, a term of it
    # has an expected gradient of 0
    of_state: ClassVar[bool] = False

    def check(self, key: str, around: Around) -> list[str]:
        return check_weight(f"{key}.weight", self.weight, around.num_steps)

    @abstractmethod
    def value(self, tokens: "Tokens") -> "Tensor":
        """Its number without the weight, [T]; its gradient is never used."""

    def combine(self, total_T: "Tensor", weight: float, tokens: "Tokens") -> "Tensor":
        """The term's advantage so far, with this one, [T]."""
        return total_T + weight * self.value(tokens)

    def distance(self) -> Self | None:
        """Itself at weight 1, where it vanishes for a teacher that is the student; else None."""
        return None


class RatioPart(Part):
    """The way of an advantage to the student: -ratio * advantage, with or without a clip."""

    kind: str

    def measures(self) -> bool:
        """True if the loss and its gradient are 0 for a teacher that is the student."""
        return False

    @abstractmethod
    def loss(self, tokens: "Tokens", advantages_T: "Tensor") -> "tuple[Tensor, Tensor]":
        """The loss, [T], and where a clip stops its gradient, bool [T]."""


class TermPart(Part):
    """A summand of the loss. What a term is averaged over, and its gates, are said here."""

    weight: Weight  # of the term in the loss; at a step where it is 0 nothing of it is computed
    # by name: which tokens count, and how much; they are multiplied
    gates: Mapping[str, GatePart] = MappingProxyType({})
    # for sampler and trainer disagreeing on a token; null: none
    correction: CorrectionPart | None = None
    # how its tokens are averaged: over all of them, within a sequence and then over sequences, or
    # added up; -norm divides by rollout.max_completion_tokens in the length's place
    aggregate: Aggregate
    # what it is averaged over: its own tokens, the sum of its gates, or every token of the
    # responses, given ones too
    denominator: Denominator = "tokens"
    whiten: bool = False

    def check(self, key: str, around: Around) -> list[str]:
        for name, gate in self.gates.items():
            if any(gate.contradicts(other) for other in self.gates.values()):
                raise ConfigError(
                    f"{key}.gates.{name}: with its own opposite no token is left; take one of them "
                    "out"
                )
            if self.denominator == "gated" and gate.when() == "within":
                raise ConfigError(
                    f"{key}.denominator: {name} changes within the update, and what a term is "
                    "averaged over must be known before it; set denominator to tokens or all"
                )
        return check_weight(f"{key}.weight", self.weight, around.num_steps)

    def at(self, step: int) -> Self:
        """Itself without what has a weight of 0 at `step`."""
        return self

    @property
    def of_traces(self) -> bool:
        """True for a term on tokens that nobody drew for the row: of traces, and of prefixes."""
        return self.needs().traces and not self.needs().rollouts

    def only_of_samples(self) -> bool:
        """True if its loss is an expectation over the student's samples, wrong on other text."""
        return False

    def fixed(self, tokens: "Tokens") -> "Tensor":
        """The sum of its advantages that are known before the update, [T]."""
        return tokens.zeros_T

    @abstractmethod
    def loss(self, tokens: "Tokens", fixed_T: "Tensor") -> "tuple[Tensor, dict[str, Tensor]]":
        """The loss per token, [T], and numbers per token for the metrics.

        `fixed_T` is what `fixed` gave before the update, whitened where the term says so.
        """

    def distance(self, vocab_size: int) -> "TermPart | None":
        """Itself, bare, where it and its gradient are 0 for a teacher that is the student."""
        return None


def parts_of(holder: "Part | Mapping[str, Part]", key: str = "") -> Iterator[tuple[str, Part]]:
    """Every part of a part, itself first, or of several by name; with the key that each has in a
    recipe."""
    if isinstance(holder, Part):
        yield key, holder
        inner = {field.name: getattr(holder, field.name) for field in fields(holder)}
    else:
        inner = dict(holder)
    for name, value in inner.items():
        if isinstance(value, Part | dict):
            yield from parts_of(value, f"{key}.{name}")
