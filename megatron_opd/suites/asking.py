"""The questions of suites as a model reads them: rendered, tokenised, each sample with a seed."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megatron_opd.contracts.draws import request_seed
from megatron_opd.contracts.rows import Task
from megatron_opd.contracts.sampling import Request, Sampling
from megatron_opd.contracts.suites import Asked, SuiteProtocol
from megatron_opd.errors import ConfigError, DataError
from megatron_opd.recipe.keys import RunConfig, SuiteConfig
from megatron_opd.suites.forms import digest
from megatron_opd.suites.open import OpenSuite, open_suites
from megatron_opd.suites.questions import Warn
from megatron_opd.suites.table import SUITES

# as the step of draws: steps never reach it, nor does the evaluation of held-out tasks
SUITE_STREAM = 1 << 21


@dataclass(frozen=True)
class SuitePrompt:
    """A sample to draw of a question."""

    suite: str
    asked: Asked
    text: str  # after the template
    request: Request
    sampling: Sampling

    @property
    def key(self) -> tuple[str, str, int]:
        """Names the sample wherever it is stored."""
        return self.suite, self.asked.question.key, self.asked.sample


class Reader(Protocol):
    """Turns a user's words into the text and the tokens that a model reads."""

    def __call__(self, words: str, protocol: SuiteProtocol) -> tuple[str, np.ndarray]:
        """Text and tokens, int32, with the protocol's system message and beginning of the response
        where it has them. Raises DataError."""


def prompts_of(suite: OpenSuite, read: Reader, *, context: int, seed: int) -> list[SuitePrompt]:
    """Every sample of every question; those of a question together, since they begin alike.

    `context` is the number of tokens that a prompt and its completion may have. A sample's seed
    depends on its suite, its question's key and its number: two models draw alike. Raises
    ConfigError where a prompt leaves no room.
    """
    protocol = suite.protocol
    sampling = Sampling(0, protocol.temperature, protocol.top_p)
    prompts = []
    known: dict[str, tuple[str, np.ndarray]] = {}
    for question in suite.questions:
        # 48 bits, which name the question in seeds
        number = int(digest(f"{suite.name}\n{question.key}")[:12], 16)
        for sample in range(protocol.samples):
            asked = suite.asked(question, sample)
            if asked.words not in known:
                known[asked.words] = _read(read, asked, suite)
            text, ids = known[asked.words]
            room = min(protocol.max_tokens, context - len(ids))
            if room < 1:
                raise ConfigError(
                    f"suite {suite.name}: the prompt of question {question.key} has {len(ids)} "
                    f"tokens and leaves no room of {context}; use a model with more positions"
                )
            task = Task(number, asked.words, asked.gold, text, ids, first_sample=sample)
            drawn = request_seed(seed, SUITE_STREAM, number, sample)
            request = Request(task, ids, room, drawn)
            prompts.append(SuitePrompt(suite.name, asked, text, request, sampling))
    return prompts


def _read(read: Reader, asked: Asked, suite: OpenSuite) -> tuple[str, np.ndarray]:
    try:
        return read(asked.words, suite.protocol)
    except DataError as error:
        raise DataError(f"suite {suite.name}: question {asked.question.key}: {error}") from error


def suites_in(config: RunConfig, warn: Warn) -> list[tuple[OpenSuite, SuiteConfig]]:
    """The suites of a recipe's `eval.suites`, with their data. Raises ConfigError, DataError."""
    opened: dict[str, tuple[OpenSuite, SuiteConfig]] = {}
    for name, settings in (config.eval.suites if config.eval else {}).items():
        if settings is None:
            continue
        if settings.data is not None and not _is_listed(name):
            raise ConfigError(
                f"eval.suites.{name}.data: is of one suite of the list; name it, or give the data "
                "in its YAML file"
            )
        suites = open_suites(
            [name],
            protocol=settings.protocol,
            data={} if settings.data is None else {name: settings.data},
            samples=settings.samples,
            max_tokens=settings.max_tokens,
            seed=config.seed,
            warn=warn,
            own_data=_own_data(name),
        )
        for suite in suites:
            if suite.name in opened:
                raise ConfigError(f"eval.suites.{name}: {suite.name} is there twice; remove one")
            opened[suite.name] = (suite, settings)
    return list(opened.values())


def _is_listed(name: str) -> bool:
    """True for a suite of the list, or its questions of a date window."""
    return name.partition(":")[0] in SUITES


def _own_data(name: str) -> str:
    """How a recipe names the data of a suite of `eval.suites`, or does without it."""
    without = f"or eval.suites.{name}=null to leave it out, eval=null all of them"
    if _is_listed(name):
        return f"eval.suites.{name}.data=PATH ({without})"
    if name.endswith((".yaml", ".yml")):
        return f"data in {name}"
    return f"eval.suites.{{name}}.data=PATH in the place of {name} ({without})"
