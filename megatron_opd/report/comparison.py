"""Several runs beside one another: the last held-out evaluations in pairs, curves, settings."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from megatron_opd.metrics.run_directory import Line
from megatron_opd.report.drawing import COLOURS, Draw, line, plain_text, series
from megatron_opd.report.evaluations import Pair, pair_of, read_last
from megatron_opd.report.headlines import duration, steps_done, time_in_steps
from megatron_opd.report.run import RunRead
from megatron_opd.report.settings import FILLED_IN, flatten
from megatron_opd.report.template import percent_of
from megatron_opd.report.verdict import points
from megatron_opd.statistics.paired import holm, p_words

_LEVEL = 0.05
_MUST_BE_ALIKE = ("eval.samples_per_prompt", "eval.temperature", "eval.top_p", "eval.skills")
_CURVES = (
    ("eval/accuracy", "Held-out accuracy, with 95 % intervals"),
    ("reward/mean", "Training reward"),
    ("rollout/completion_tokens/mean", "Response length, tokens"),
    ("student/entropy/mean", "Entropy of the student, nats per token"),
    ("teacher/agreement/mean", "Agreement with the teacher's argmax"),
    ("train/loss", "Loss, of each method its own"),
    ("train/grad_norm", "Gradient norm"),
    ("timing/step_seconds", "Seconds per step"),
)


@dataclass(frozen=True)
class RunShown:
    """A row of the table of runs."""

    label: str
    colour: str
    method: str
    steps: str
    time: str
    before: str
    after: str
    interval: str
    reward: str


@dataclass(frozen=True)
class Against:
    """The last evaluation of a run against that of the first run."""

    label: str
    kind: str  # "better", "worse" or "open"
    sentence: str
    difference: str
    interval: str
    p: str
    corrected_p: str  # Holm's, over the runs compared
    changed: str
    problems: str


@dataclass(frozen=True)
class Comparison:
    """What several runs are, one against another."""

    runs: list[RunShown]
    against: list[Against]
    notes: list[str]
    settings: list[tuple[str, list[str]]]  # keys that differ, with the value of every run


def compare_runs(runs: Sequence[RunRead]) -> Comparison:
    """Compares every run with the first. Raises DataError for a file that cannot be read."""
    labels = labels_of(runs)
    shown = [_run(*both) for both in zip(runs, labels, cycle(COLOURS), strict=False)]
    settings = _differing([run.config for run in runs])
    return Comparison(shown, _against(runs, labels), _notes(settings), settings)


def labels_of(runs: Sequence[RunRead]) -> list[str]:
    """A short name for every run, unlike the others'."""
    names = [run.directory.resolve().name for run in runs]
    repeated = {name for name, count in Counter(names).items() if count > 1}
    paths = [str(run.directory) for run in runs]
    return [path if name in repeated else name for name, path in zip(names, paths, strict=True)]


def curves(runs: Sequence[RunRead]) -> list[tuple[str, str, Draw]]:
    """Name, title and drawing of a plot per metric that one of the runs has."""
    suites = {key for run in runs for row in run.rows for key in row if _is_suite(key)}
    more = [(key, f"{key.split('/')[1]}, with 95 % intervals") for key in sorted(suites)]
    labels = labels_of(runs)
    return [
        (key.replace("/", "_"), title, _curve(key, runs, labels))
        for key, title in (*_CURVES, *more)
    ]


def _curve(key: str, runs: Sequence[RunRead], labels: Sequence[str]) -> Draw:
    def draw(axes: Axes, _: Sequence[Line]) -> bool:
        drawn = False
        for run, label, colour in zip(runs, labels, cycle(COLOURS), strict=False):
            steps, low = series(run.rows, f"{key}/low")
            if len(steps):
                high = series(run.rows, f"{key}/high")[1]
                axes.fill_between(steps, low, high, color=colour, alpha=0.12, linewidth=0)
            drawn |= line(axes, run.rows, key, colour, plain_text(Path(label).name))
        return drawn

    return draw


def _is_suite(key: str) -> bool:
    return key.startswith("suite/") and key.endswith("/score")


# ------------------------------------------------------------------------------------------- tables
def _run(run: RunRead, label: str, colour: str) -> RunShown:
    _, accuracy = series(run.rows, "eval/accuracy")
    _, reward = series(run.rows, "reward/mean")
    last = next((row for row in reversed(run.rows) if "eval/accuracy/low" in row), None)
    interval = ""
    if last:
        low = 100 * last["eval/accuracy/low"]
        interval = f"{low:.1f} to {100 * last['eval/accuracy/high']:.1f}"
    planned = run.num_steps
    done = steps_done(run.rows)
    seconds = time_in_steps(run.rows)
    return RunShown(
        label=label,
        colour=colour,
        method=run.method,
        steps=f"{done:,} of {planned:,}" if planned and done < planned else f"{done:,}",
        time=duration(seconds) if seconds else "",
        before=percent_of(accuracy[0]) if len(accuracy) > 1 else "",
        after=percent_of(accuracy[-1]) if len(accuracy) else "",
        interval=interval,
        reward=f"{reward[-1]:.3f}" if len(reward) else "",
    )


def _against(runs: Sequence[RunRead], labels: Sequence[str]) -> list[Against]:
    evaluations = [read_last(run.directory) for run in runs]
    first = evaluations[0]
    pairs = [pair_of(first, other) if first and other else None for other in evaluations[1:]]
    corrected = iter(holm([pair.difference.p for pair in pairs if pair]))
    shown = []
    for label, pair in zip(labels[1:], pairs, strict=True):
        if pair is None:
            shown.append(_no_pair(label, labels[0]))
        else:
            shown.append(_of_pair(label, labels[0], pair, next(corrected)))
    return shown


def _no_pair(label: str, base: str) -> Against:
    words = f"{label} and {base} have no held-out problems in common, so nothing is compared."
    return Against(label, "open", words, "", "", "", "", "", "0")


def _of_pair(label: str, base: str, pair: Pair, corrected_p: float) -> Against:
    of = pair.difference
    interval = f"{points(of.low)} to {points(of.high)}"
    problems = f"{len(pair.keys):,}"
    certain = pair.certain and corrected_p <= _LEVEL
    kind = "open"
    if certain:
        kind = "better" if of.mean > 0 else "worse"
        words = (
            f"{label} is {kind} than {base} by {abs(100 * of.mean):.1f} points "
            f"(95 %: {interval}, {problems} problems)."
        )
    else:
        words = (
            f"{label} and {base} are not told apart: {points(of.mean)} points "
            f"(95 %: {interval}, corrected p {p_words(corrected_p)}); {problems} problems "
            f"show differences from {100 * of.detectable:.1f} points on."
        )
    return Against(
        label=label,
        kind=kind,
        sentence=words,
        difference=points(of.mean),
        interval=interval,
        p=p_words(of.p).removeprefix("= "),
        corrected_p=p_words(corrected_p).removeprefix("= "),
        changed=f"{of.improved:,}, {of.worsened:,}",
        problems=problems,
    )


def _differing(configs: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    flat = [dict(flatten(config)) for config in configs]
    keys = dict.fromkeys(key for one in flat for key in one)
    rows = [(key, [one.get(key, "") for one in flat]) for key in keys]
    return [
        (key, values)
        for key, values in rows
        if len(set(values)) > 1 and not key.startswith((*FILLED_IN, "name"))
    ]


def _notes(settings: Sequence[tuple[str, list[str]]]) -> list[str]:
    """What makes the evaluations unlike one another."""
    unlike = [key for key, _ in settings if key in _MUST_BE_ALIKE]
    if not unlike:
        return []
    return [
        f"The runs were evaluated with different {', '.join(unlike)}, which moves accuracy too."
    ]
