"""A result graded again: its completions stay, its verdicts are those of today's graders."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_opd import __version__
from megatron_opd.bench.compare import check_sums
from megatron_opd.bench.page import write_page
from megatron_opd.bench.results import (
    GraderUsed,
    SuiteResult,
    read_result,
    read_samples_by_suite,
    write_result,
)
from megatron_opd.bench.summary import summarise
from megatron_opd.bench.table import print_result
from megatron_opd.contracts.suites import Answer, Asked, GradedSample, Grader, Question
from megatron_opd.errors import ConfigError, DataError
from megatron_opd.recipe.rewards import RewardConfig
from megatron_opd.suites.open import OpenSuite, open_suites
from megatron_opd.suites.table import SUITES
from megatron_opd.verify.graders.open import open_graders

SHOWN = 5  # changed verdicts of a suite


@dataclass(frozen=True)
class Changed:
    """A sample whose verdict is another one now."""

    before: GradedSample
    after: GradedSample


def regrade_directory(
    source: Path, out: Path, data: Mapping[str, str], suites: Sequence[str] = ()
) -> None:
    """Writes a new result in `out`, and prints which verdicts changed.

    The questions are read again, from `data` or from where they were: `suites` names the YAML files
    of a user's own. Raises ConfigError, DataError, RunError.
    """
    if out.exists():
        raise ConfigError(f"--out {out}: exists already; give a new directory")
    result = read_result(source)
    samples = read_samples_by_suite(source, result)
    graded: list[GradedSample] = []
    results = {}
    protocols = {name: suite.protocol for name, suite in result.suites.items()}
    with ExitStack() as closing:
        graders = open_graders(protocols, RewardConfig(), closing)
        for name, suite in result.suites.items():
            opened = open_again(name, suite, data, suites)
            questions = {question.key: question for question in opened.questions}
            again, changed = regrade(samples[name], questions, graders[name])
            graded += again
            used = GraderUsed(suite.protocol.grader, dict(graders[name].versions))
            results[name] = replace(suite, grader=used, summary=summarise(again))
            _say(name, len(again), changed)
    new = replace(result, megatron_opd=__version__, suites=results)
    write_result(out, new, graded)
    print_result(new)
    print(f"wrote {write_page(out)}")


def regrade(
    samples: Sequence[GradedSample], questions: Mapping[str, Question], grader: Grader
) -> tuple[list[GradedSample], list[Changed]]:
    """All samples of one suite with new verdicts, and those that changed, in their order.

    `questions` are the suite's by key. The gold answer and the order of options are those that the
    sample was asked with, so that no shuffle is repeated. Raises DataError for a sample whose
    question is not among them.
    """
    answers = [_answer(one, questions) for one in samples]
    verdicts = grader.grade(answers)
    graded = [replace(one, verdict=verdict) for one, verdict in zip(samples, verdicts, strict=True)]
    changed = [
        Changed(before, after)
        for before, after in zip(samples, graded, strict=True)
        if before.verdict != after.verdict
    ]
    return graded, changed


def _answer(one: GradedSample, questions: Mapping[str, Question]) -> Answer:
    if one.key not in questions:
        raise DataError(
            f"{one.suite}: question {one.key} of the samples is not in the data; name the data "
            "that the samples were asked from"
        )
    asked = Asked(questions[one.key], one.sample, one.prompt, one.gold, one.order)
    return Answer.to(one.prompt, asked, one.text, truncated=one.truncated)


def open_again(
    name: str, suite: SuiteResult, data: Mapping[str, str], suites: Sequence[str]
) -> OpenSuite:
    """A suite of a result with its questions, as it was asked: from `data`, or from where they
    were. `suites` names the YAML files of a user's own. Raises ConfigError, DataError."""
    packaged = name.partition(":")[0] in SUITES
    if not packaged and not suites:
        raise ConfigError(f"bench: {name} is a suite of yours; give --suites and its YAML file")
    names = [name] if packaged else [*suites]
    given = {name: data[name]} if name in data else _where(name, suite) if packaged else {}
    opened = {one.name: one for one in open_suites(names, data=given, warn=lambda _: None)}
    if name not in opened:
        raise ConfigError(f"bench: {name} is none of the suites of {', '.join(suites)}")
    if check_sums(opened[name].provenance) != check_sums(suite.data):
        raise DataError(
            f"{name}: its data are not those of the result (another sha256); name them as --data "
            f"{name}=PATH"
        )
    seed = suite.data.get("shuffle_seed", 0)
    assert isinstance(seed, int), "a result keeps the seed of its options' order"
    return replace(opened[name], protocol=suite.protocol, seed=seed)


def _where(name: str, suite: SuiteResult) -> dict[str, str]:
    """The data that a result was made of, for `open_suites`; {} where a suite knows its own."""
    path = suite.data.get("path")
    if isinstance(path, str):
        return {name: path}
    hub = suite.data.get("hub")
    return {name: f"{hub}@{suite.data['revision']}"} if isinstance(hub, str) else {}


def _say(name: str, samples: int, changed: Sequence[Changed]) -> None:
    print(f"{name}: {len(changed)} of {samples} verdicts changed")
    for change in changed[:SHOWN]:
        before = change.before.verdict
        after = change.after.verdict
        print(
            f"  question {change.after.key}, sample {change.after.sample}: {before.reason} "
            f"({before.score:g}) is now {after.reason} ({after.score:g}); its answer: "
            f"{after.extracted[:60]!r}, gold {change.after.gold[:60]!r}"
        )
