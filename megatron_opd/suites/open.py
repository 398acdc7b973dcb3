"""The suites that a user names, with their questions."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_opd.contracts.suites import Asked, Question, SuiteProtocol
from megatron_opd.errors import ConfigError
from megatron_opd.suites.prompts import ask
from megatron_opd.suites.protocols import protocol_of
from megatron_opd.suites.questions import Warn, read_questions
from megatron_opd.suites.suite import Suite
from megatron_opd.suites.table import suites_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenSuite:
    """A suite with its data, ready to be asked."""

    suite: Suite
    protocol: SuiteProtocol
    questions: list[Question]  # their keys differ
    # where they are from: path, or hub and revision; sha256 by file, rows_read, filter, questions,
    # questions_expected, shuffle_seed
    provenance: dict[str, object]
    seed: int  # of the order of options

    @property
    def name(self) -> str:
        return self.suite.name

    @property
    def title(self) -> str:
        return self.suite.title

    def asked(self, question: Question, sample: int) -> Asked:
        """A question as the sample of that number, from 0, reads it: the same on every call."""
        return ask(question, sample, self.protocol, self.seed)


def open_suites(
    names: Sequence[str],
    *,
    protocol: str = "official",
    data: Mapping[str, str] | None = None,
    samples: int | None = None,
    max_tokens: int | None = None,
    seed: int = 0,
    warn: Warn = logger.warning,
) -> list[OpenSuite]:
    """The suites of these names and groups, every one once, with all their questions read.

    `data` has a file, folder or Hub id by suite, where they are not the suite's own of the Hub.
    `samples` of every question, and `max_tokens` of a completion, replace the protocol's. `seed`
    draws the order of options. `warn` gets a line for what is odd and not wrong.

    Raises ConfigError for names, DataError for data, in one line.
    """
    suites = {suite.name: suite for name in names for suite in suites_of(name)}
    given = dict(data or {})
    for name in given:
        if name not in suites:
            raise ConfigError(
                f"--data {name}: is none of the suites that are asked for ({', '.join(suites)})"
            )
    opened = []
    for suite in suites.values():
        asked_as = protocol_of(suite, protocol, samples=samples, max_tokens=max_tokens)
        found = read_questions(suite, given.get(suite.name), warn)
        provenance = {**found.provenance, "shuffle_seed": seed}
        opened.append(OpenSuite(suite, asked_as, found.questions, provenance, seed))
    return opened
