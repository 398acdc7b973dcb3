"""Results and comparisons on a terminal."""

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from megatron_opd.bench.compare import Comparison
from megatron_opd.bench.results import Result, SuiteResult
from megatron_opd.contracts.rows import VERIFIER_FAILURES
from megatron_opd.statistics.paired import p_words
from megatron_opd.suites.listing import Listed

_FAILURES = tuple(reason for reason in VERIFIER_FAILURES if reason != "bad_gold")


def print_result(result: Result, console: Console | None = None) -> None:
    """The scores of all suites with their interval over questions and their error over seeds."""
    head = ("suite", "N x k", "avg@k", "95 %, questions", "95 %, seeds", "pass@k", "maj@k", "cut",
            "no answer", "tokens")  # fmt: skip
    rows = [_row(name, suite) for name, suite in result.suites.items()]
    _print(f"{result.model.get('path', 'model')}, in percent", head, rows, console)
    for name, suite in result.suites.items():
        for note in notes_of(name, suite):
            _line(note, console)


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Every suite's difference, then a sentence on each."""
    head = ("suite", "N x k", "first", "second", "difference", "95 %", "p", "p, Holm",
            "better, worse", "detectable")  # fmt: skip
    rows = []
    for suite in comparison.suites:
        of = suite.difference
        rows.append((
            suite.suite, f"{suite.questions} x {suite.samples}", percent(suite.first),
            percent(suite.second), f"{100 * of.mean:+.1f}",
            f"{100 * of.low:+.1f} to {100 * of.high:+.1f}", p_words(of.p).removeprefix("= "),
            p_words(suite.corrected_p).removeprefix("= "), f"{of.improved}, {of.worsened}",
            percent(of.detectable),
        ))  # fmt: skip
    title = f"{comparison.second} (second) against {comparison.first} (first), in points"
    _print(title, head, rows, console)
    for suite in comparison.suites:
        _line(suite.sentence, console)
    for note in comparison.notes:
        _line(f"note: {note}", console)
    if comparison.left_out:
        _line(f"only one of the two has {', '.join(comparison.left_out)}", console)


def print_suites(suites: Sequence[Listed], console: Console | None = None) -> None:
    """What can be asked: numbers of questions and samples, graders, and where the data are."""
    head = ("suite", "N", "k official", "luffy", "tropd", "grader", "data", "licence", "groups")
    rows = []
    for suite in suites:
        samples = [str(suite.samples[name]) for name in ("official", "luffy", "tropd")]
        questions = "any" if suite.questions is None else f"{suite.questions:,}"
        groups = " ".join(suite.groups)
        rows.append(
            (suite.name, questions, *samples, suite.grader, suite.data, suite.licence, groups)
        )
    _print("suites: N questions, k samples of each by protocol", head, rows, console)
    for suite in suites:
        if suite.note:
            _line(f"{suite.name}: {suite.note}", console)


def percent(value: float | None) -> str:
    """A score in percent with one digit; "-" where there is none."""
    return "-" if value is None else f"{100 * value:.1f}"


def over_seeds(seed_error: float | None) -> str:
    """How far another seed's score is from this one in 19 cases of 20, "± 2.5"; "-" where one
    sample of every question does not show it."""
    return "-" if seed_error is None else f"± {percent(1.96 * seed_error)}"


def notes_of(name: str, suite: SuiteResult) -> list[str]:
    """What a reader of the score must know beside it."""
    summary = suite.summary
    samples = summary.questions * summary.samples
    notes = []
    expected = suite.data.get("questions_expected")
    if isinstance(expected, int) and expected != summary.questions:
        notes.append(
            f"{name}: {summary.questions:,} questions, the published data have {expected:,}; "
            "compare its score with none of another number"
        )
    if suite.overlap and suite.overlap.overlapping:
        notes.append(
            f"{name}: {suite.overlap.overlapping} of {summary.questions} questions share 13 words "
            f"in a row with one of {suite.overlap.problems:,} training problems, "
            f"{suite.overlap.exact} have all their words; the score may be of memory"
        )
    if summary.truncated > 0.05:
        notes.append(
            f"{name}: {percent(summary.truncated)} % of the completions were cut at "
            f"{suite.protocol.max_tokens:,} tokens; a higher max_tokens may raise the score"
        )
    if summary.timeouts:
        notes.append(f"{name}: the grading of {summary.timeouts:,} of {samples:,} was stopped")
    failed = sum(summary.reasons.get(reason, 0) for reason in _FAILURES)
    if failed:
        notes.append(f"{name}: the grader failed on {failed:,} of {samples:,}; they score 0")
    if summary.bad_golds:
        notes.append(
            f"{name}: {summary.bad_golds:,} gold answers cannot be compared with; they score 0"
        )
    options = summary.options
    if options and options.spread > options.chance_spread:
        notes.append(
            f"{name}: scores differ by {100 * options.spread:.1f} points with the letter of the "
            f"right option (by chance up to {100 * options.chance_spread:.1f})"
        )
    return notes


def _row(name: str, suite: SuiteResult) -> tuple[str, ...]:
    of = suite.summary
    most = str(of.samples)
    return (
        name, f"{of.questions} x {of.samples}", percent(of.score),
        f"{percent(of.low)} to {percent(of.high)}", over_seeds(of.seed_error),
        percent(of.pass_at[most]) if of.samples > 1 else "-",
        percent(of.majority) if of.samples > 1 else "-", percent(of.truncated),
        percent(of.unanswered), f"{of.tokens.mean:,.0f}",
    )  # fmt: skip


def _print(
    title: str, head: Sequence[str], rows: Sequence[Sequence[str]], console: Console | None
) -> None:
    if console is None and not sys.stdout.isatty():
        print(title)
        for row in (head, *rows):
            print("  " + " | ".join(row))
        return
    table = Table(title=title, title_justify="left")
    for name in head:
        table.add_column(name, justify="left" if name == "suite" else "right")
    for row in rows:
        table.add_row(*row)
    (console or Console()).print(table)


def _line(text: str, console: Console | None) -> None:
    if console is None:
        print(text)
    else:
        console.print(text, soft_wrap=True, highlight=False, markup=False)
