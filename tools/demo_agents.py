"""Agents on one machine: a toy world with hidden rules, a student that can read skills but knows no
world, GRPO beside SDAR from the same start, and a report of each.

    python tools/demo_agents.py                           # runs/demo_agents_start, ..._grpo, ...
    python tools/demo_agents.py --seed 1 --out runs/seed1   # other worked turns, other weights

Every stage is a `megatron-opd` command that is printed before it runs. A stage that is done is
skipped, one that was stopped goes on from its last checkpoint.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.demo import run, train  # noqa: E402

METHODS = {"demo_agents_grpo": "GRPO", "demo_agents": "SDAR"}


def main() -> int:
    parser = argparse.ArgumentParser(description="Train agents in a toy world with two methods.")
    parser.add_argument(
        "--out", type=Path, default=Path("runs"), help="parent of all run directories (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the start and of the sampling")
    arguments = parser.parse_args()
    started = time.monotonic()
    titles_and_commands = stages(arguments.out, arguments.seed)
    try:
        for number, (title, command) in enumerate(titles_and_commands, start=1):
            print(f"\n== {number} of {len(titles_and_commands)}: {title}", flush=True)
            run(command)
    except subprocess.CalledProcessError as error:
        print(
            f"demo-agents: stopped (exit code {error.returncode}); the same command goes on",
            file=sys.stderr,
        )
        return abs(error.returncode)
    summarise(arguments.out, time.monotonic() - started)
    return 0


def stages(out: Path, seed: int) -> list[tuple[str, list[str] | str]]:
    """Title and command of each; a text in the place of a command says why there is nothing to
    do."""
    assets = out / "demo_agents_assets"
    start = out / "demo_agents_start" / "hf"
    make: list[str] | str = [
        sys.executable,
        str(ROOT / "tools" / "make_demo_agents.py"),
        "--out",
        str(assets),
        "--seed",
        str(seed),
    ]
    if (assets / "student" / "tokenizer.json").exists():
        make = f"{assets} is there already"
    learning = [f"student.path={start}", f"skills.bank={assets / 'skills'}"]
    beginning = [f"student.path={assets / 'student'}", f"data.train={assets / 'turns.jsonl'}"]
    return [
        ("worked turns of other worlds, two banks of skills, a random model", make),
        (
            "the student learns to act and to read skills, and knows no world",
            train("demo_agents_start", out, seed, beginning),
        ),
        (
            "GRPO: it plays in a world of its own, and learns from what it wins",
            train("demo_agents_grpo", out, seed, learning),
        ),
        (
            "SDAR: the same, and it learns from itself as it would act with the skill",
            train("demo_agents", out, seed, learning),
        ),
    ]


def summarise(out: Path, seconds: float) -> None:
    """Prints the success of both before and after, and where to look."""
    print("\n== success in tasks that were held out: without skills, and with them")
    for recipe, method in METHODS.items():
        rows = evaluations(out / recipe)
        before = shown(rows[0])
        after = shown(rows[-1])
        print(f"{method}  before {before}; after {rows[-1]['step']} steps {after}")
    for recipe in METHODS:
        print(f"report   {out / recipe / 'report.html'}")
    print(f"took {seconds / 60:.1f} minutes")


def evaluations(directory: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "eval/accuracy" in row]


def shown(row: dict[str, Any]) -> str:
    low = row["eval/accuracy/low"]
    high = row["eval/accuracy/high"]
    with_skills = row["eval/with_skills/accuracy"]
    return f"{row['eval/accuracy']:.1%} (95 %: {low:.1%} to {high:.1%}), {with_skills:.1%}"


if __name__ == "__main__":
    sys.exit(main())
