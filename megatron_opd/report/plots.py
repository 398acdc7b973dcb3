"""The plots of a run, as PNG, from the lines of `metrics.jsonl`.

A plot whose metrics the run does not have is left out.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megatron_opd.metrics.run_directory import Line
from megatron_opd.report.drawing import (
    HELDOUT,
    INK,
    STUDENT,
    TEACHER,
    Draw,
    line,
    plain_text,
    series,
    stacked_bars,
    style,
)
from megatron_opd.report.terms import term_plots

_PHASES = {
    "generate": "#2f6fdb",
    "reward": "#7fb2f0",
    "gather": "#c9b458",
    "teacher": "#d9822b",
    "train": "#0f8a5f",
    "refit": "#8f6bd1",
    "checkpoint": "#c75b8c",
    "eval": "#8c96a3",
    "other": "#d5dae1",
}
_REASON_COLOURS = (
    "#5cb893", "#ea9a97", "#efc182", "#b9a2e4", "#8fb4ee", "#dfa0c0", "#a9b1bc", "#d5dae1",
)  # fmt: skip
_TURN_COLOURS = ("#2f6fdb", "#d9822b", "#0f8a5f", "#8f6bd1", "#c75b8c")
_RIGHT = ("reward/reason/correct", "reward/reason/won")


@dataclass(frozen=True)
class Plot:
    """A plot of the page."""

    name: str  # file name without suffix
    title: str
    wide: bool  # twice the width of the others
    png: bytes


def draw_plots(rows: Sequence[Line]) -> list[Plot]:
    """One plot per quantity the run measured, in reading order."""
    return draw(rows, PLOTS[:-_BEHIND] + tuple(term_plots(rows)) + PLOTS[-_BEHIND:], WIDE)


def draw(
    rows: Sequence[Line], drawings: Sequence[tuple[str, str, Draw]], wide: Sequence[str]
) -> list[Plot]:
    """Plots by name, title and drawing; those named in `wide` have twice the width."""
    plots = []
    for name, title, drawing in drawings:
        figure = figure_of(drawing, rows, wide=name in wide)
        if figure:
            buffer = io.BytesIO()
            FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
            plots.append(Plot(name, title, name in wide, buffer.getvalue()))
    return plots


def figure_of(drawing: Draw, rows: Sequence[Line], *, wide: bool = False) -> Figure | None:
    """A figure with one plot; None where there is nothing to draw."""
    figure = Figure(figsize=(8.2 if wide else 4.0, 2.3), dpi=180, layout="constrained")
    axes = figure.add_subplot()
    if not drawing(axes, rows):
        return None
    style(axes)
    return figure


# ---------------------------------------------------------------------------- one function per plot
def _reward(axes: Axes, rows: Sequence[Line]) -> bool:
    drawn = line(axes, rows, "reward/mean", STUDENT, "training reward")
    steps, accuracy = series(rows, "eval/accuracy")
    if len(steps):
        axes.plot(
            steps,
            accuracy,
            "--o",
            color=HELDOUT,
            markersize=5,
            linewidth=1.2,
            label=_with_ends("held-out accuracy", accuracy),
        )
    skilled = line(axes, rows, "eval/with_skills/accuracy", TEACHER, "held out, with skills")
    return drawn or skilled or bool(len(steps))


def _with_ends(name: str, values: np.ndarray) -> str:
    """A curve's name with its first and last value, which beside the curve would cover it."""
    ends = f"{values[0]:.1%}" if len(values) == 1 else f"{values[0]:.1%} to {values[-1]:.1%}"
    return f"{name}, {ends}"


def _loss(axes: Axes, rows: Sequence[Line]) -> bool:
    return line(axes, rows, "train/loss", STUDENT)


def _response_length(axes: Axes, rows: Sequence[Line]) -> bool:
    return line(axes, rows, "rollout/completion_tokens/mean", STUDENT)


def _grad_norm(axes: Axes, rows: Sequence[Line]) -> bool:
    return line(axes, rows, "train/grad_norm", STUDENT)


def _entropy(axes: Axes, rows: Sequence[Line]) -> bool:
    student = line(axes, rows, "student/entropy/mean", STUDENT, "student")
    teacher = line(axes, rows, "teacher/entropy/mean", TEACHER, "teacher, on the student's text")
    return student or teacher


def _agreement(axes: Axes, rows: Sequence[Line]) -> bool:
    return line(axes, rows, "teacher/agreement/mean", TEACHER)


def _mismatch(axes: Axes, rows: Sequence[Line]) -> bool:
    _, values = series(rows, "mismatch/logprob_abs/mean")
    if not (values > 0).any():  # a log axis needs something to show
        return False
    axes.set_yscale("log")
    return line(axes, rows, "mismatch/logprob_abs/mean", STUDENT)


def _reasons(axes: Axes, rows: Sequence[Line]) -> bool:
    prefix = "reward/reason/"
    totals: dict[str, float] = {}
    for row in rows:
        for key, count in row.items():
            if key.startswith(prefix):
                totals[key] = totals.get(key, 0) + (count or 0)
    counted = [row for row in rows if any(key in totals for key in row)]
    keys = sorted(totals, key=lambda key: (key not in _RIGHT, -totals[key]))
    counts = np.array([[row.get(key) or 0 for row in counted] for key in keys], dtype=np.float64)
    if not counts.any():
        return False
    share = counts / np.maximum(counts.sum(axis=0), 1)
    names = [plain_text(key.removeprefix(prefix).replace("_", " ")) for key in keys]
    colours = [_REASON_COLOURS[index % len(_REASON_COLOURS)] for index in range(len(keys))]
    stacked_bars(axes, np.array([row["step"] for row in counted]), share, names, colours)
    axes.set_ylim(0, 1)
    return True


def _suites(axes: Axes, rows: Sequence[Line]) -> bool:
    """A line for every suite, with its interval over questions."""
    names = sorted({key.split("/")[1] for row in rows for key in row if key.startswith("suite/")})
    for index, name in enumerate(names):
        colour = _TURN_COLOURS[index % len(_TURN_COLOURS)]
        steps, low = series(rows, f"suite/{name}/score/low")
        _, high = series(rows, f"suite/{name}/score/high")
        axes.fill_between(steps, low, high, color=colour, alpha=0.12, linewidth=0)
        line(axes, rows, f"suite/{name}/score", colour, plain_text(name.replace("_", " ")))
    return bool(names)


def _gap(axes: Axes, rows: Sequence[Line]) -> bool:
    return _by_turn(axes, rows, "teacher/gap")


def _endorsed(axes: Axes, rows: Sequence[Line]) -> bool:
    return _by_turn(axes, rows, "teacher/endorsed")


def _by_turn(axes: Axes, rows: Sequence[Line], name: str) -> bool:
    """A line for each of the first turns that a metric is told of."""
    drawn = [
        line(axes, rows, f"{name}/turn_{turn}/mean", colour, f"turn {turn + 1}")
        for turn, colour in enumerate(_TURN_COLOURS)
        if any(f"{name}/turn_{turn}/mean" in row for row in rows)
    ]
    return bool(drawn)


def _turns(axes: Axes, rows: Sequence[Line]) -> bool:
    return line(axes, rows, "rollout/turns/mean", STUDENT)


def _time(axes: Axes, rows: Sequence[Line]) -> bool:
    timed = [row for row in rows if "timing/step_seconds" in row]
    if not timed:
        return False
    total = np.array([row["timing/step_seconds"] or 0 for row in timed], dtype=np.float64)
    phases = {}
    for name in _PHASES:
        if name != "other":
            values = [row.get(f"timing/{name}_seconds") or 0 for row in timed]
            phases[name] = np.array(values, dtype=np.float64)
    phases["other"] = np.maximum(total - sum(phases.values()), 0)
    phases = {name: values for name, values in phases.items() if values.any()}
    steps = np.array([row["step"] for row in timed])
    seconds_PN = np.array(list(phases.values()))
    stacked_bars(axes, steps, seconds_PN, list(phases), [_PHASES[name] for name in phases])
    axes.set_ylabel("seconds", fontsize=8, color=INK)
    height = np.sum(list(phases.values()), axis=0)
    usual = 1.8 * float(np.quantile(height, 0.9))
    if height.max() > usual:  # a slow first step must not flatten the others
        axes.set_ylim(0, usual)
        slowest = int(height.argmax())
        # Over the axes: within them it would cover the bars.
        words = f"step {steps[slowest]}: {height[slowest]:.1f} s"
        axes.set_title(words, loc="right", fontsize=8, color=INK)
    return True


PLOTS: tuple[tuple[str, str, Draw], ...] = (
    ("reward", "Reward", _reward),
    ("suites", "Benchmark suites, with 95 % intervals over questions", _suites),
    ("reasons", "Why answers score as they do", _reasons),
    ("response_length", "Response length, tokens", _response_length),
    ("turns", "Turns of an episode", _turns),
    ("gap", "Teacher's gap to the student, nats per token", _gap),
    ("endorsed", "Tokens that the teacher likes better", _endorsed),
    ("entropy", "Entropy, nats per token", _entropy),
    ("agreement", "Agreement with the teacher's argmax", _agreement),
    ("loss", "Loss", _loss),
    ("grad_norm", "Gradient norm", _grad_norm),
    ("mismatch", "Engine vs trainer, mean |Δ logprob|", _mismatch),
    ("time", "Time per phase", _time),
)
WIDE = ("reward", "time")
_BEHIND = 2  # plots behind those of the terms
