"""Agents on one machine: a toy world with hidden rules, a student that can read skills but knows no
world, GRPO beside SDAR from the same start, at the same time, and a report of each.

    python tools/demo_agents.py                           # runs/demo_agents_start, ..._grpo, ...
    python tools/demo_agents.py --seed 1 --out runs/seed1   # other worked turns, other weights

Every stage is a `megatron-opd` command that is printed before it runs. A stage that is done is
skipped, one that was stopped goes on from its last checkpoint.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.demo import run, signals_passed_on, train  # noqa: E402

METHODS = {"demo_agents_grpo": "GRPO", "demo_agents": "SDAR"}


def main() -> int:
    parser = argparse.ArgumentParser(description="Train agents in a toy world with two methods.")
    parser.add_argument(
        "--out", type=Path, default=Path("runs"), help="parent of all run directories (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the start and of the sampling")
    arguments = parser.parse_args()
    started = time.monotonic()
    try:
        for number, (title, command) in enumerate(preparations(arguments.out, arguments.seed), 1):
            print(f"\n== {number} of 3: {title}", flush=True)
            run(command)
        print("\n== 3 of 3: GRPO learns from what it wins, SDAR also from itself with the skill")
        run_side_by_side(comparison(arguments.out, arguments.seed))
    except subprocess.CalledProcessError as error:
        print(
            f"demo-agents: stopped (exit code {error.returncode}); the same command goes on",
            file=sys.stderr,
        )
        return abs(error.returncode)
    summarise(arguments.out, time.monotonic() - started)
    return 0


def preparations(out: Path, seed: int) -> list[tuple[str, list[str] | str]]:
    """Title and command of each; a text in the place of a command says why there is nothing to
    do."""
    assets = out / "demo_agents_assets"
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
    beginning = [f"student.path={assets / 'student'}", f"data.train={assets / 'turns.jsonl'}"]
    return [
        ("worked turns of other worlds, two banks of skills, a random model", make),
        (
            "the student learns to act and to read skills, and knows no world",
            train("demo_agents_start", out, seed, beginning),
        ),
    ]


def comparison(out: Path, seed: int) -> dict[str, list[str] | str]:
    """By method, the command that trains with it from the common start; or why there is none."""
    learning = [
        f"student.path={out / 'demo_agents_start' / 'hf'}",
        f"skills.bank={out / 'demo_agents_assets' / 'skills'}",
    ]
    commands = {}
    for recipe, method in METHODS.items():
        commands[method] = train(recipe, out, seed, learning, processes=1)
    return commands


def run_side_by_side(commands: Mapping[str, list[str] | str]) -> None:
    """Runs the commands at the same time, the cores shared out; their lines begin with the name.

    Raises CalledProcessError, when all have ended, if one failed.
    """
    threads = max(1, (os.cpu_count() or 1) // len(commands))
    environment = dict(os.environ) | {"OMP_NUM_THREADS": str(threads)}
    processes = []
    readers = []
    for name, command in commands.items():
        if isinstance(command, str):
            print(command)
            continue
        print(f"$ {shlex.join(command)}", flush=True)
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        reader = threading.Thread(target=print_lines, args=(name, process))
        reader.start()
        processes.append(process)
        readers.append(reader)
    with signals_passed_on(processes):
        codes = [process.wait() for process in processes]
        for reader in readers:
            reader.join()
    for process, code in zip(processes, codes, strict=True):
        if code:
            raise subprocess.CalledProcessError(code, process.args)


def print_lines(name: str, process: "subprocess.Popen[str]") -> None:
    assert process.stdout is not None
    for line in process.stdout:
        print(f"{name}  {line}", end="", flush=True)


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
