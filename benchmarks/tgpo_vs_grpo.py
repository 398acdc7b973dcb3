"""What the teacher is worth: the demo's TGPO and GRPO from the same student at the same budget,
three seeds each.

    python benchmarks/tgpo_vs_grpo.py [--seeds 0 1 2]

A seed is another split of the sums, other initial weights, another teacher and another student to
start from. The learning rate of the demo is TGPO's; GRPO runs at it and at the best rate found for
it on the validation sums. Prints a table, writes JSON, and keeps the runs (a run that is finished
is not repeated).
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
PHASES = ("generate", "reward", "gather", "teacher", "train", "refit")
VARIANTS = {
    "tgpo_annealing": [],
    "grpo, same rate": ["method=grpo"],
    "grpo, its best rate": ["method=grpo", "train.optimizer.lr=1e-3"],
    "grpo++, same rate": ["method=grpo++"],
    "grpo++, its best rate": ["method=grpo++", "train.optimizer.lr=1e-3"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description="TGPO against GRPO on the demo task.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/bench/tgpo_vs_grpo"),
        help="of the runs (%(default)s)",
    )
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/tgpo_vs_grpo.json"))
    arguments = parser.parse_args()
    results = {
        variant: [
            measure(run(variant, overrides, arguments.out / f"seed{seed}", seed))
            for seed in arguments.seeds
        ]
        for variant, overrides in VARIANTS.items()
    }
    show(results)
    document = {"seeds": arguments.seeds, "machine": machine(), "results": results}
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    print(f"wrote {arguments.json}")


def run(variant: str, overrides: list[str], out: Path, seed: int) -> Path:
    """The finished run directory of one variant and seed."""
    demo = [sys.executable, str(ROOT / "tools" / "demo.py"), "--out", str(out), "--seed", str(seed)]
    if not overrides:
        execute(demo)
        return out / "demo"
    directory = out / variant.replace(", ", "-").replace(" ", "_")
    if (directory / "report.html").exists():
        return directory
    resume = ["--resume"] if (directory / "config.yaml").exists() else []
    # The demo run of this seed is the recipe: the same student, data and budget.
    recipe = [str(out / "demo" / "config.yaml"), *overrides, f"run_dir={directory}"]
    execute([sys.executable, "-m", "megatron_opd", "train", *recipe, "--nproc", "2", *resume])
    return directory


def execute(command: list[str]) -> None:
    if subprocess.run(command).returncode:
        sys.exit(f"this command failed: {' '.join(command)}")


def measure(directory: Path) -> dict[str, float]:
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    accuracies = [row["eval/accuracy"] for row in rows if "eval/accuracy" in row]
    steps = [row for row in rows[1:] if "timing/step_seconds" in row]
    seconds = sum(row["timing/step_seconds"] for row in steps)
    shares = {
        f"share_of_step/{p}": sum(row[f"timing/{p}_seconds"] for row in steps) / seconds
        for p in PHASES
    }
    return {
        "accuracy_before": accuracies[0],
        "accuracy_after": accuracies[-1],
        "gain_points": 100 * (accuracies[-1] - accuracies[0]),
        "best_training_reward": max(row["reward/mean"] for row in steps),
        "step_seconds": seconds / len(steps),
        "mismatch_logprob_abs_max_over_steps": max(
            row["mismatch/logprob_abs/mean"] for row in steps
        ),
        **shares,
    }


def show(results: dict[str, list[dict[str, float]]]) -> None:
    table = Table(title="Held-out accuracy, greedy, in % (500 problems)")
    for column in (
        "method",
        "before",
        "after",
        "gain: mean",
        "gain: standard deviation",
        "seconds per step",
    ):
        table.add_column(column, justify="left" if column == "method" else "right")
    for variant, seeds in results.items():
        gains = [seed["gain_points"] for seed in seeds]
        table.add_row(
            variant,
            "  ".join(f"{100 * seed['accuracy_before']:.1f}" for seed in seeds),
            "  ".join(f"{100 * seed['accuracy_after']:.1f}" for seed in seeds),
            f"{mean(gains):+.1f}",
            f"{stdev(gains):.1f}" if len(gains) > 1 else "",
            f"{mean(seed['step_seconds'] for seed in seeds):.2f}",
        )
    Console(width=120).print(table)


def machine() -> dict[str, str]:
    return {
        "platform": platform.platform(),
        "cores": str(len(os.sched_getaffinity(0))),
        "gpu": "none",
    }


if __name__ == "__main__":
    main()
