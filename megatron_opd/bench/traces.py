"""Right samples of an evaluation, as traces from which methods learn."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_opd import __version__
from megatron_opd.bench.regrade import open_again
from megatron_opd.bench.results import read_result, read_samples_by_suite
from megatron_opd.contracts.suites import GradedSample
from megatron_opd.errors import RunError
from megatron_opd.evaluation.traces import Keep, check_out, chosen, write_columns


def traces_of_result(
    source: Path, out: Path, keep: Keep, data: Mapping[str, str], suites: Sequence[str] = ()
) -> None:
    """Writes the samples of a result that are right and ended by themselves as a .parquet file.

    Columns: problem (the words that the model was asked, as the suite's protocol has them), answer,
    response, sample. `keep` is the first one of a question, the shortest one, or all; `data` and
    `suites` are those of `regrade.regrade_directory`. Raises ConfigError, DataError, and RunError
    when nothing is right.
    """
    check_out(out)
    result = read_result(source)
    samples = read_samples_by_suite(source, result)
    columns: dict[str, list[Any]] = {"problem": [], "answer": [], "response": [], "sample": []}
    for name, suite in result.suites.items():
        opened = open_again(name, suite, data, suites)
        questions = {question.key: question for question in opened.questions}
        for one in kept(samples[name], keep):
            columns["problem"].append(opened.asked(questions[one.key], one.sample).words)
            columns["answer"].append(one.gold)
            columns["response"].append(one.text)
            columns["sample"].append(one.sample)
    if not columns["problem"]:
        raise RunError(f"{source}: no sample is right and ended by itself; nothing is kept")
    provenance = {
        "megatron_opd": __version__,
        "model": result.model,
        "engine": result.engine,
        "suites": {name: suite.data for name, suite in result.suites.items()},
        "keep": keep,
    }
    write_columns(out, columns, provenance)
    print(f"{out}: {len(columns['problem'])} traces of {', '.join(result.suites)}")


def kept(samples: Sequence[GradedSample], keep: Keep) -> list[GradedSample]:
    """The right samples of a suite that ended by themselves: all, or one of every question."""
    right: dict[str, list[GradedSample]] = {}
    for one in samples:
        if one.verdict.correct and not one.truncated:
            right.setdefault(one.key, []).append(one)
    traces: list[GradedSample] = []
    for of_question in right.values():
        of_question.sort(key=lambda one: one.sample)
        traces += chosen(of_question, keep, lambda one: one.tokens)
    return traces
