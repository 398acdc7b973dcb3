"""The plots of a page of results."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megatron_opd.bench.papers import PaperRow
from megatron_opd.bench.results import Result
from megatron_opd.bench.summary import by_question, scores_of
from megatron_opd.contracts.suites import GradedSample
from megatron_opd.report.drawing import BAD, HELDOUT, INK, STUDENT, TEACHER, plain_text, style

_RIGHT = "#5cb893"
_MOST_BARS = 400


@dataclass(frozen=True)
class Picture:
    """A plot, as a page holds it."""

    title: str
    png: str  # base64


def scores(result: Result, papers: Mapping[str, Sequence[PaperRow]]) -> Picture:
    """Every suite's score with its two errors, and the papers' rows of equal measure."""
    names = list(result.suites)
    figure = Figure(figsize=(8.2, 0.8 + 0.42 * len(names)), dpi=180, layout="constrained")
    axes = figure.add_subplot()
    for place, name in enumerate(names):
        of = result.suites[name].summary
        first = not place
        axes.plot(
            [100 * of.low, 100 * of.high], [place] * 2, color=STUDENT, linewidth=2, alpha=0.35,
            solid_capstyle="round", label="95 %, over questions" if first else None,
        )  # fmt: skip
        if of.seed_error is not None:
            half = 196 * of.seed_error
            axes.plot(
                [100 * of.score - half, 100 * of.score + half], [place] * 2, color=STUDENT,
                linewidth=6, alpha=0.45, label="95 %, over seeds" if first else None,
            )  # fmt: skip
        axes.plot(100 * of.score, place, "o", color=STUDENT, markersize=7)
        axes.text(
            100 * of.score, place - 0.27, f"{100 * of.score:.1f}", ha="center", va="bottom",
            fontsize=8, color=STUDENT, weight="bold",
        )  # fmt: skip
        rows = papers.get(name, ())
        values = [float(row.score) for row in rows]
        label = "papers, same N and k"
        known = axes.get_legend_handles_labels()[1]
        axes.plot(
            values, [place] * len(values), "|", color=TEACHER, markersize=13, markeredgewidth=2,
            label=label if values and label not in known else None,
        )  # fmt: skip
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.6)
    axes.set_xlim(0, 100)
    return _finished("Scores, percent", figure, axes, "percent right", grid="x")


def questions(samples: Sequence[GradedSample]) -> Picture:
    """A bar for every question, the easiest first; neighbours are averaged where there are very
    many."""
    mean_N = np.sort(scores_of(by_question(samples)).mean(axis=1))[::-1]
    width = -(-len(mean_N) // _MOST_BARS)
    starts = np.arange(0, len(mean_N), width)
    sizes = np.diff(np.append(starts, len(mean_N)))
    heights = np.add.reduceat(mean_N, starts) / sizes
    figure = Figure(figsize=(4.0, 2.3), dpi=180, layout="constrained")
    axes = figure.add_subplot()
    axes.bar(
        starts + sizes / 2,
        heights,
        width=(0.86 if len(mean_N) <= 60 else 1.0) * width,
        color=_RIGHT,
    )
    axes.set_ylim(0, 1.02)
    axes.set_xlim(0, len(mean_N))
    solved = int((mean_N == 1).sum())
    never = int((mean_N == 0).sum())
    some = len(mean_N) - solved - never
    title = f"Right: {solved} always, {some} sometimes, {never} never"
    return _finished(title, figure, axes, "questions, easiest first")


def lengths(samples: Sequence[GradedSample], limit: int) -> Picture:
    """How long right, wrong and cut completions are."""
    kinds = {
        "right": ([one.tokens for one in samples if one.verdict.correct], _RIGHT),
        "wrong": (
            [one.tokens for one in samples if not one.verdict.correct and not one.truncated],
            "#ea9a97",
        ),
        "cut": ([one.tokens for one in samples if one.truncated and not one.verdict.correct],
                "#8c96a3"),
    }  # fmt: skip
    most = max(one.tokens for one in samples)
    width = -(-(most + 1) // 40)  # whole tokens, at most 40 bars
    edges = np.arange(0, most + 1 + width, width) - 0.5
    figure = Figure(figsize=(4.0, 2.3), dpi=180, layout="constrained")
    axes = figure.add_subplot()
    axes.hist(
        [tokens for tokens, _ in kinds.values()], bins=list(edges), stacked=True,
        color=[colour for _, colour in kinds.values()], label=list(kinds),
    )  # fmt: skip
    if most > 0.7 * limit:
        axes.axvline(limit, color=BAD, linewidth=1, linestyle="--")
    return _finished("Length of completions", figure, axes, "tokens")


def groups(samples: Sequence[GradedSample], result: Result) -> Picture | None:
    """The scores of the groups with their intervals; None for a suite without."""
    of_groups = result.suites[samples[0].suite].summary.groups
    if not of_groups:
        return None
    shown = sorted(of_groups.items(), key=lambda item: item[1].score)
    figure = Figure(figsize=(4.0, 0.7 + 0.21 * len(shown)), dpi=180, layout="constrained")
    axes = figure.add_subplot()
    for place, (_, group) in enumerate(shown):
        axes.plot(
            [100 * group.low, 100 * group.high], [place] * 2, color=HELDOUT, linewidth=2, alpha=0.4
        )
        axes.plot(100 * group.score, place, "o", color=HELDOUT, markersize=5)
    names = [f"{plain_text(name)} ({group.questions})" for name, group in shown]
    axes.set_yticks(range(len(shown)), names)
    axes.set_ylim(-0.6, len(shown) - 0.4)
    axes.set_xlim(0, 100)
    return _finished("By group (questions)", figure, axes, "percent right", grid="x")


def _finished(title: str, figure: Figure, axes: Axes, label: str, grid: str = "y") -> Picture:
    style(axes, label)
    axes.grid(visible=False)
    axes.grid(axis="x" if grid == "x" else "y", color="#e8ebef", linewidth=0.8)
    axes.tick_params(colors=INK)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return Picture(title, base64.b64encode(buffer.getvalue()).decode())
