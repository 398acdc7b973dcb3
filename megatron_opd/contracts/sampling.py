"""Requests to engines, their completions, and the draws of a sampler. NumPy only, no torch."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megatron_opd.contracts.rows import Task
from megatron_opd.contracts.skills import Skill


@dataclass(frozen=True)
class Request:
    """Tokens to continue."""

    task: Task  # errors name it; requests of one task begin alike
    prompt_ids: np.ndarray  # int32, all that stands before the first new token
    max_tokens: int  # at most this many new ones
    seed: int


@dataclass(frozen=True)
class Sampling:
    """The distribution from which an engine draws the tokens of its requests."""

    version: int  # of the weights
    temperature: float  # 0 is greedy
    top_p: float = 1.0
    keep_cache: bool = False  # keys and values of the call before may be used again
    stop: tuple[str, ...] = ()  # words that end a completion where they are written


@dataclass(frozen=True)
class Completion:
    """The tokens sampled for a request."""

    token_ids: list[int]
    logprobs: list[float]  # nats, of the distribution sampled from: after temperature and top_p
    finish_reason: str  # "stop" (the last token is an end, or completes a stop word) | "length"
    by_word: bool = False  # a stop word ended it: the last token is one of its text


@dataclass(frozen=True)
class ContextLogprobs:
    """What an engine's model makes of a context: of every token but the first, given those before.

    At temperature 1, whatever it samples with.
    """

    logprobs: list[float]  # nats
    ranks: list[int]  # of the token among all of the vocabulary; 1 is the likeliest


@dataclass(frozen=True)
class Draw:
    """A sampler's draws for every task, which depend on (seed, step, task, sample) alone."""

    seed: int
    step: int  # that the rows are for
    version: int  # of the weights that are to draw
    samples: int  # of every task
    max_tokens: int  # of a completion
    temperature: float  # 0 is greedy
    top_p: float = 1.0
    stop: tuple[str, ...] = ()  # words that end a completion where they are written

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.version, self.temperature, self.top_p, stop=self.stop)


class Prompter(Protocol):
    """Turns the words for a model into tokens, with the recipe's template."""

    def prompt(self, words: str, skill: Skill | None = None) -> np.ndarray:
        """The prompt whose user says `words`; with a privileged text where the recipe puts it."""

    def continuation(self, words: str, *, ended: bool) -> np.ndarray:
        """What stands between an answer and the next one, for an observation. `ended`: the answer
        has the token that ends it."""
