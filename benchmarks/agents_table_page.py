"""docs/agents_table.md from the results of agents_table.py. Run alone, from the committed JSON."""

import json
import sys
from collections.abc import Mapping
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.make_docs import with_table  # noqa: E402

PAGE = ROOT / "docs" / "agents_table.md"
MARKS = "<!-- table: begin (make docs) -->\n<!-- table: end -->\n"
# 97.5 % of Student's t with 1, 2, ... degrees of freedom
STUDENT_T = (12.71, 4.30, 3.18, 2.78, 2.57)

Results = Mapping[str, Mapping[str, Mapping[str, Any]]]


def write_page(results: Results) -> str:
    if not PAGE.exists():
        PAGE.write_text(f"# SDAR and its baselines, on a toy world\n\n{MARKS}")
    PAGE.write_text(with_table(PAGE.read_text(), "table", table(results)))
    return f"wrote {PAGE}"


def table(results: Results) -> str:
    """A row per variant: success after, the paired difference to GRPO with its interval, success
    with skills, and in training."""
    seeds = list(results["GRPO"])
    before = ", ".join(f"{results['GRPO'][seed]['before']:.1%}" for seed in seeds)
    lines = [
        f"Seeds {', '.join(seeds)}; before, without skills: {before}. Means over seeds; the "
        "difference to GRPO is within seeds, with its 95 % interval by Student's t.",
        "",
        "| variant | seeds | held out | minus GRPO, points | held out, with skills | last 10 steps "
        "of training |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for variant, of_seed in results.items():
        rows = list(of_seed.values())
        cells = [
            variant,
            str(len(rows)),
            f"{mean(row['after'] for row in rows):.1%}",
            difference(of_seed, results["GRPO"]) if variant != "GRPO" else "",
            f"{mean(row['with_skills_after'] for row in rows):.1%}",
            f"{mean(row['trained'] for row in rows):.1%}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def difference(of_seed: Mapping[str, Any], grpo: Mapping[str, Any]) -> str:
    """In points, over the seeds that both have."""
    points = [
        100 * (of_seed[seed]["after"] - grpo[seed]["after"]) for seed in of_seed if seed in grpo
    ]
    if len(points) < 2:
        return f"{points[0]:+.1f}" if points else ""
    half = STUDENT_T[len(points) - 2] * stdev(points) / sqrt(len(points))
    return f"{mean(points):+.1f} ± {half:.1f}"


if __name__ == "__main__":
    stored = json.loads((ROOT / "benchmarks" / "results" / "agents_table.json").read_text())
    print(write_page(stored["results"]))
