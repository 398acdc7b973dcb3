"""The suites that a user names, with their questions."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_opd.contracts.suites import Asked, Question, SuiteProtocol
from megatron_opd.errors import ConfigError
from megatron_opd.suites.forms import digest
from megatron_opd.suites.own import read_own
from megatron_opd.suites.prompts import ask
from megatron_opd.suites.protocols import protocol_of
from megatron_opd.suites.questions import Warn, read_questions
from megatron_opd.suites.suite import Suite
from megatron_opd.suites.table import GROUPS, SUITES, suites_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenSuite:
    """A suite with its data, ready to be asked."""

    suite: Suite
    protocol: SuiteProtocol
    questions: list[Question]  # their keys differ
    # where they are from: path, or hub and revision; sha256 by file, rows_read, filter, questions,
    # questions_expected, asked (of the questions), shuffle_seed
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
    limit: int | None = None,
    seed: int = 0,
    warn: Warn = logger.warning,
    own_data: str = "--data {name}=PATH",
) -> list[OpenSuite]:
    """The suites of these names, groups and a user's own YAML files, every one once, with their
    questions read.

    `data` has a file, folder or Hub id by suite, where they are not the suite's own of the Hub.
    `samples` of every question, and `max_tokens` of a completion, replace the protocol's. `limit`
    takes that many questions of every suite, spread over its groups. `seed` draws the order of
    options. `warn` gets a line for what is odd and not wrong. `own_data` is how an error tells
    the user to name a suite's data.

    Raises ConfigError for names, DataError for data, in one line.
    """
    asked_for = list(_named(names, protocol, samples, max_tokens))
    by_name = {suite.name: (suite, asked_as, path) for suite, asked_as, path in asked_for}
    given = dict(data or {})
    for name in given:
        if name not in by_name:
            raise ConfigError(
                f"--data {name}: is none of the suites that are asked for ({', '.join(by_name)})"
            )
    opened = []
    for suite, asked_as, path in by_name.values():
        told = replace(suite, own_data=own_data.format(name=suite.name))
        read = read_questions(told, given.get(suite.name, path), warn)
        questions = first_of(read.questions, limit)
        provenance = {**read.provenance, "shuffle_seed": seed, "asked": len(questions)}
        opened.append(OpenSuite(suite, asked_as, questions, provenance, seed))
    return opened


def _named(
    names: Sequence[str], protocol: str, samples: int | None, max_tokens: int | None
) -> Iterator[tuple[Suite, SuiteProtocol, str | None]]:
    """The suites of names, groups and files, and where a user's own has its data."""
    for name in names:
        if name.endswith((".yaml", ".yml")):
            suite, own, path = read_own(Path(name))
            if suite.name in SUITES or suite.name in GROUPS:
                raise ConfigError(f"{name}: name: {suite.name} is a suite already; choose another")
            asked_as = replace(
                own, samples=samples or own.samples, max_tokens=max_tokens or own.max_tokens
            )
            yield suite, asked_as, path
            continue
        for suite in suites_of(name):
            yield suite, protocol_of(suite, protocol, samples=samples, max_tokens=max_tokens), None


def first_of(questions: list[Question], limit: int | None) -> list[Question]:
    """At most `limit` questions, spread over the groups as they all are, chosen by digests of
    their keys: the same ones whatever the order of the data, and a larger limit adds to them."""
    if limit is None or limit >= len(questions):
        return questions
    by_group: dict[str, list[Question]] = {}
    for question in sorted(questions, key=lambda question: digest(question.key)):
        by_group.setdefault(question.group, []).append(question)
    # The k-th of a group of n stands at (k + 1/2) / n of all.
    placed = [
        ((number + 0.5) / len(members), group, question.key)
        for group, members in by_group.items()
        for number, question in enumerate(members)
    ]
    chosen = {key for _, _, key in sorted(placed)[:limit]}
    return [question for question in questions if question.key in chosen]
