"""The plots of a run, as PNG, from the lines of `metrics.jsonl`.

A plot whose metrics the run does not have is left out.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megatron_opd.metrics.run_directory import Line

STUDENT = "#2f6fdb"
TEACHER = "#d9822b"
HELDOUT = "#0f8a5f"
BAD = "#d13438"
INK = "#5b6472"
GRID = "#e8ebef"
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
_RIGHT = ("reward/reason/correct", "reward/reason/won")
_MAX_BARS = 150


@dataclass(frozen=True)
class Plot:
    """A plot of the page."""

    name: str  # file name without suffix
    title: str
    wide: bool  # twice the width of the others
    png: bytes


def draw_plots(rows: Sequence[Line]) -> list[Plot]:
    """One plot per quantity the run measured, in reading order."""
    plots = []
    for name, title, draw in _PLOTS:
        wide = name in _WIDE
        figure = Figure(figsize=(8.2 if wide else 4.0, 2.3), dpi=180, layout="constrained")
        axes = figure.add_subplot()
        if draw(axes, rows):
            _style(axes)
            buffer = io.BytesIO()
            FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
            plots.append(Plot(name, title, wide, buffer.getvalue()))
    return plots


def series(rows: Sequence[Line], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps, int64 [N], and values, float64 [N], of the lines that have `key`.

    A value that was not finite is NaN.
    """
    lines = [row for row in rows if key in row]
    steps = [row["step"] for row in lines]
    values = [np.nan if row[key] is None else row[key] for row in lines]
    return np.array(steps, dtype=np.int64), np.array(values, dtype=np.float64)


# ---------------------------------------------------------------------------- one function per plot
def _reward(axes: Axes, rows: Sequence[Line]) -> bool:
    drawn = _line(axes, rows, "reward/mean", STUDENT, "training reward")
    steps, accuracy = series(rows, "eval/accuracy")
    if len(steps):
        axes.plot(
            steps,
            accuracy,
            "--o",
            color=HELDOUT,
            markersize=5,
            linewidth=1.2,
            label="held-out accuracy",
        )
        for index in {0, len(steps) - 1}:
            axes.annotate(
                f"{accuracy[index]:.1%}",
                (steps[index], accuracy[index]),
                xytext=(0, 6),
                textcoords="offset points",
                ha="left" if index == 0 else "right",
                fontsize=8,
                color=HELDOUT,
                weight="bold",
            )
        axes.margins(y=0.18)
    skilled = _line(axes, rows, "eval/with_skills/accuracy", TEACHER, "held out, with skills")
    return drawn or skilled or bool(len(steps))


def _loss(axes: Axes, rows: Sequence[Line]) -> bool:
    return _line(axes, rows, "train/loss", STUDENT)


def _response_length(axes: Axes, rows: Sequence[Line]) -> bool:
    return _line(axes, rows, "rollout/completion_tokens/mean", STUDENT)


def _grad_norm(axes: Axes, rows: Sequence[Line]) -> bool:
    return _line(axes, rows, "train/grad_norm", STUDENT)


def _entropy(axes: Axes, rows: Sequence[Line]) -> bool:
    student = _line(axes, rows, "student/entropy/mean", STUDENT, "student")
    teacher = _line(axes, rows, "teacher/entropy/mean", TEACHER, "teacher, on the student's text")
    return student or teacher


def _agreement(axes: Axes, rows: Sequence[Line]) -> bool:
    return _line(axes, rows, "teacher/agreement/mean", TEACHER)


def _guidance(axes: Axes, rows: Sequence[Line]) -> bool:
    steps, weights = series(rows, "objective/guidance/weight")
    axes.plot(steps, weights, color=TEACHER, linewidth=2, marker=_marker(len(steps)), markersize=4)
    axes.set_ylim(bottom=0)
    return bool(len(steps))


def _mismatch(axes: Axes, rows: Sequence[Line]) -> bool:
    _, values = series(rows, "mismatch/logprob_abs/mean")
    if not (values > 0).any():  # a log axis needs something to show
        return False
    axes.set_yscale("log")
    return _line(axes, rows, "mismatch/logprob_abs/mean", STUDENT)


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
    names = [_plain_text(key.removeprefix(prefix).replace("_", " ")) for key in keys]
    colours = [_REASON_COLOURS[index % len(_REASON_COLOURS)] for index in range(len(keys))]
    _stacked_bars(axes, np.array([row["step"] for row in counted]), share, names, colours)
    axes.set_ylim(0, 1)
    return True


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
    _stacked_bars(axes, steps, seconds_PN, list(phases), [_PHASES[name] for name in phases])
    axes.set_ylabel("seconds", fontsize=8, color=INK)
    height = np.sum(list(phases.values()), axis=0)
    usual = 1.8 * float(np.quantile(height, 0.9))
    if height.max() > usual:  # a slow first step must not flatten the others
        axes.set_ylim(0, usual)
        slowest = int(height.argmax())
        axes.annotate(
            f"step {steps[slowest]}: {height[slowest]:.1f} s",
            (0.99, 0.97),
            xycoords="axes fraction",
            ha="right",
            va="top",
            fontsize=8,
            color=INK,
        )
    return True


_PLOTS: tuple[tuple[str, str, Callable[[Axes, Sequence[Line]], bool]], ...] = (
    ("reward", "Reward", _reward),
    ("reasons", "Why answers score as they do", _reasons),
    ("response_length", "Response length, tokens", _response_length),
    ("entropy", "Entropy, nats per token", _entropy),
    ("agreement", "Agreement with the teacher's argmax", _agreement),
    ("loss", "Loss", _loss),
    ("grad_norm", "Gradient norm", _grad_norm),
    ("guidance_weight", "Guidance weight", _guidance),
    ("mismatch", "Engine vs trainer, mean |Δ logprob|", _mismatch),
    ("time", "Time per phase", _time),
)
_WIDE = ("reward", "time")


# ------------------------------------------------------------------------------------------ drawing
def _line(
    axes: Axes, rows: Sequence[Line], key: str, colour: str, label: str | None = None
) -> bool:
    """Draws a metric; True if the run has it.

    Many values are pale under their moving average. A cross marks a value that was not finite.
    """
    steps, values = series(rows, key)
    window = len(steps) // 15
    smooth = window >= 2
    axes.plot(
        steps, values, color=colour, linewidth=1 if smooth else 1.8, alpha=0.3 if smooth else 1,
        marker=_marker(len(steps)), markersize=4, label=None if smooth else label,
    )  # fmt: skip
    if smooth:
        axes.plot(steps, _moving_average(values, window), color=colour, linewidth=2, label=label)
    bad = steps[np.isnan(values)]
    axes.plot(
        bad,
        np.full(len(bad), 0.03),
        "x",
        color=BAD,
        markersize=6,
        transform=axes.get_xaxis_transform(),
    )
    return bool(len(steps))


def _moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """The mean over the finite ones of the last `window` values; NaN if there are none."""
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    stop = np.arange(1, len(values) + 1)
    start = np.maximum(stop - window, 0)
    with np.errstate(invalid="ignore"):
        return (sums[stop] - sums[start]) / (counts[stop] - counts[start])


def _stacked_bars(
    axes: Axes, steps: np.ndarray, heights_PN: np.ndarray, names: list[str], colours: list[str]
) -> None:
    """Draws one bar per step; if there are too many, one per stretch of steps, with their mean."""
    width = -(-len(steps) // _MAX_BARS)
    starts = np.arange(0, len(steps), width)
    sizes = np.diff(np.append(starts, len(steps)))
    heights_PN = np.add.reduceat(heights_PN, starts, axis=1) / sizes
    centres = np.add.reduceat(steps, starts) / sizes
    bottom = np.zeros(len(centres))
    for height_N, name, colour in zip(heights_PN, names, colours, strict=True):
        axes.bar(centres, height_N, bottom=bottom, width=width, color=colour, label=name)
        bottom = bottom + height_N


def _style(axes: Axes) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#c4cad3")
    axes.tick_params(which="both", colors=INK, labelsize=8, length=0)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.set_xlabel("step", fontsize=8, color=INK)
    if axes.get_legend_handles_labels()[1]:
        axes.figure.legend(
            loc="outside upper left",
            ncols=8,
            fontsize=8,
            frameon=False,
            labelcolor=INK,
            handlelength=1.1,
            columnspacing=1.2,
            borderaxespad=0.1,
        )


def _marker(count: int) -> str:
    return "o" if count <= 12 else ""


def _plain_text(text: str) -> str:
    """A short text for matplotlib, which reads $...$ as mathematics and no control characters."""
    printable = "".join(character for character in text if character.isprintable())
    return printable[:24].replace("$", r"\$")
