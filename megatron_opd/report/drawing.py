"""How the report draws: colours, lines of a metric, bars, axes."""

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from megatron_opd.metrics.run_directory import Line

# of the curves of one plot, in their order
COLOURS = ("#2f6fdb", "#d9822b", "#0f8a5f", "#8f6bd1", "#c75b8c", "#7a6a00", "#5b6472")
# Draws into the axes; False where the run has nothing to draw.
Draw = Callable[[Axes, Sequence[Line]], bool]
STUDENT = "#2f6fdb"
TEACHER = "#d9822b"
HELDOUT = "#0f8a5f"
BAD = "#d13438"
INK = "#5b6472"
GRID = "#e8ebef"
_MAX_BARS = 150


def series(rows: Sequence[Line], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps, int64 [N], and values, float64 [N], of the lines that have `key`.

    A value that was not finite is NaN.
    """
    lines = [row for row in rows if key in row]
    steps = [row["step"] for row in lines]
    values = [np.nan if row[key] is None else row[key] for row in lines]
    return np.array(steps, dtype=np.int64), np.array(values, dtype=np.float64)


def line(
    axes: Axes,
    rows: Sequence[Line],
    key: str,
    colour: str,
    label: str | None = None,
    *,
    smoothed: bool = True,
) -> bool:
    """Draws a metric; True if the run has it.

    Many values are pale under their moving average. A cross marks a value that was not finite.
    """
    steps, values = series(rows, key)
    if not len(steps):
        return False
    window = len(steps) // 15 if smoothed else 0
    smooth = window >= 2
    axes.plot(
        steps, values, color=colour, linewidth=1 if smooth else 1.8, alpha=0.3 if smooth else 1,
        marker=marker(len(steps)), markersize=4, label=None if smooth else label,
    )  # fmt: skip
    if smooth:
        axes.plot(steps, moving_average(values, window), color=colour, linewidth=2, label=label)
    bad = steps[np.isnan(values)]
    axes.plot(
        bad,
        np.full(len(bad), 0.03),
        "x",
        color=BAD,
        markersize=6,
        transform=axes.get_xaxis_transform(),
    )
    return True


def moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """The mean over the finite ones of the last `window` values; NaN if there are none."""
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    stop = np.arange(1, len(values) + 1)
    start = np.maximum(stop - window, 0)
    with np.errstate(invalid="ignore"):
        return (sums[stop] - sums[start]) / (counts[stop] - counts[start])


def stacked_bars(
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


def style(axes: Axes, label: str = "step") -> None:
    """A plot's quiet axes; `label` is that of the horizontal one."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#c4cad3")
    axes.tick_params(which="both", colors=INK, labelsize=8, length=0)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.set_xlabel(label, fontsize=8, color=INK)
    labels = axes.get_legend_handles_labels()[1]
    if labels:
        # Characters of 8 points are about 4.6 points wide, and a line's sample 22.
        widest = max(map(len, labels)) * 4.6 + 22
        points = 72 * axes.figure.get_figwidth()
        axes.figure.legend(
            loc="outside upper left",
            ncols=max(1, min(len(labels), int(points / widest))),
            fontsize=8,
            frameon=False,
            labelcolor=INK,
            handlelength=1.1,
            columnspacing=1.2,
            borderaxespad=0.1,
        )


def marker(count: int) -> str:
    return "o" if count <= 12 else ""


def plain_text(text: str) -> str:
    """A short text for matplotlib, which reads $...$ as mathematics and no control characters."""
    printable = "".join(character for character in text if character.isprintable())
    return printable[:24].replace("$", r"\$")
