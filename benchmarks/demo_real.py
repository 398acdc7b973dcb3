"""What `make demo-real` shows, seed by seed: held-out accuracy of the teacher, and of the student
at every evaluation.

    python benchmarks/demo_real.py [--seeds 0]

A seed is another split of the questions and other samples; the model is the same. Ten minutes a
seed on two idle cores. Prints a table, writes JSON, and keeps the runs (a run that is finished is
not repeated).
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.tgpo_vs_grpo import PHASES, execute, machine  # noqa: E402
from tools.demo_real import wilson  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description="The demo on a real language model.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--out", type=Path, default=Path("runs/bench/demo_real"), help="of the runs (%(default)s)"
    )
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/demo_real.json"))
    arguments = parser.parse_args()
    results = []
    for seed in arguments.seeds:
        out = arguments.out / f"seed{seed}"
        execute(
            [
                sys.executable,
                str(ROOT / "tools" / "demo_real.py"),
                "--out",
                str(out),
                "--seed",
                str(seed),
            ]
        )
        results.append({"seed": seed} | measure(out))
    show(results)
    document = {"model": "SmolLM2-135M-Instruct", "machine": machine(), "results": results}
    arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    print(f"wrote {arguments.json}")


def measure(out: Path) -> dict[str, Any]:
    run = out / "demo_real"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "timing/step_seconds" in row]
    return {
        "teacher": teacher_accuracy(run / "config.yaml", out / "demo_real_teacher" / "hf"),
        "student": {row["step"]: row["eval/accuracy"] for row in rows if "eval/accuracy" in row},
        "heldout": sum(1 for _ in (run / "heldout" / "step-000000.jsonl").open()),
        "reward": [round(row["reward/mean"], 4) for row in steps],
        "step_seconds": sum(row["timing/step_seconds"] for row in steps) / len(steps),
        "phase_seconds": {
            p: sum(row[f"timing/{p}_seconds"] for row in steps) / len(steps) for p in PHASES
        },
    }


def teacher_accuracy(recipe: Path, model: Path) -> float:
    command = [sys.executable, "-m", "megatron_opd", "eval", str(recipe), "--model", str(model)]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    lines = dict(line.split()[:2] for line in done.stdout.splitlines() if line.startswith("eval/"))
    return float(lines["eval/accuracy"])


def show(results: list[dict[str, Any]]) -> None:
    table = Table(title="Held-out accuracy, greedy (95 % interval)")
    for column in ("seed", "teacher", *(f"student, step {step}" for step in results[0]["student"])):
        table.add_column(column, justify="right")
    for result in results:
        shares = [result["teacher"], *result["student"].values()]
        table.add_row(
            str(result["seed"]), *(in_percent(share, result["heldout"]) for share in shares)
        )
    Console(width=120).print(table)


def in_percent(share: float, count: int) -> str:
    low, high = wilson(share, count)
    return f"{share:.1%} ({low:.0%} to {high:.0%})"


if __name__ == "__main__":
    main()
