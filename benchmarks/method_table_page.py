"""docs/method_table.md and its picture, from the results of method_table.py. Run alone, from the
committed JSON."""

import json
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.make_docs import with_table  # noqa: E402

Results = dict[str, dict[str, list[dict[str, Any]]]]
MARKS = "<!-- table: begin (make docs) -->\n<!-- table: end -->\n"
COLOURS = {"near": "#1f6f8b", "distant": "#d1495b"}


def write_page(results: Results, seeds: list[int], page: Path, picture: Path) -> str:
    picture.parent.mkdir(parents=True, exist_ok=True)
    draw(results, picture)
    if not page.exists():
        page.write_text(
            f"# Every method, on a toy task\n\n![{picture.stem}](images/{picture.name})\n\n{MARKS}"
        )
    page.write_text(with_table(page.read_text(), "table", table(results, seeds)))
    return f"wrote {page} and {picture}"


def table(results: Results, seeds: list[int]) -> str:
    """One row per method: gain, length and gradient norm for both teachers, by gain from the near
    one."""
    methods = sorted(results["near"], key=lambda method: -mean(gains(results["near"][method])))
    starts = [f"{100 * row['before']:.1f}" for row in next(iter(results["near"].values()))]
    lines = [
        f"Seeds {', '.join(map(str, seeds))}; greedy accuracy before {', '.join(starts)} %. Mean "
        "(standard deviation).",
        "",
        "| method | near: gain in points | tokens | gradient norm | distant: gain in points | "
        "tokens | gradient norm |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for method in methods:
        cells = [f"`{method}`"]
        for family in ("near", "distant"):
            rows = results[family].get(method, [])
            if not rows:
                cells += ["", "", ""]
                continue
            ended = sum("failed" in row for row in rows)
            mark = f", {ended} ended early" if ended else ""
            cells.append(f"{mean(gains(rows)):+.1f} ({deviation(gains(rows)):.1f}){mark}")
            cells.append(f"{mean(row['tokens_after'] for row in rows):.1f}")
            cells.append(f"{mean(row['grad_norm_mean'] for row in rows):.2g}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def gains(rows: list[dict[str, Any]]) -> list[float]:
    return [100 * row["gain"] for row in rows]


def deviation(values: list[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def draw(results: Results, picture: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    methods = sorted(results["near"], key=lambda method: mean(gains(results["near"][method])))
    panels = {
        "gain in points, greedy": lambda row: 100 * row["gain"],
        "tokens per response, after": lambda row: row["tokens_after"],
        "gradient norm, mean over steps": lambda row: row["grad_norm_mean"],
    }
    figure, axes = plt.subplots(
        1, len(panels), figsize=(13, 0.27 * len(methods) + 1.5), sharey=True
    )
    for axis, (title, value) in zip(axes, panels.items(), strict=True):
        for offset, (family, colour) in zip((0.16, -0.16), COLOURS.items(), strict=True):
            for y, method in enumerate(methods):
                values = [value(row) for row in results[family].get(method, [])]
                if values:
                    axis.plot(
                        values,
                        [y + offset] * len(values),
                        "o",
                        color=colour,
                        alpha=0.45,
                        markersize=4,
                    )
                    axis.plot(
                        mean(values),
                        y + offset,
                        "|",
                        color=colour,
                        markersize=11,
                        markeredgewidth=2,
                    )
        axis.set_title(title, fontsize=10)
        axis.grid(axis="x", alpha=0.3)
    axes[0].axvline(0, color="black", linewidth=0.8)
    axes[2].set_xscale("log")
    axes[0].set_yticks(range(len(methods)), methods, fontsize=8)
    handles = [
        plt.Line2D([], [], marker="o", linestyle="", color=colour) for colour in COLOURS.values()
    ]
    figure.legend(
        handles, [f"{family} teacher" for family in COLOURS], loc="lower right", ncols=2, fontsize=9
    )
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(picture, dpi=110)


def main() -> None:
    document = json.loads((ROOT / "benchmarks" / "results" / "method_table.json").read_text())
    page, picture = ROOT / "docs" / "method_table.md", ROOT / "docs" / "images" / "method_table.png"
    print(write_page(document["results"], document["seeds"], page, picture))


if __name__ == "__main__":
    main()
