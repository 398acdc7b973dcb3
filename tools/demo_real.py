"""A real language model learns from its own samples on two CPU cores: SmolLM2-135M-Instruct,
questions in English.

    python tools/demo_real.py                             # runs/demo_real_task,
    runs/demo_real_teacher, runs/demo_real python tools/demo_real.py --seed 1 --out runs/seed1   #
    another split of the questions, other samples

As `tools/demo.py` does: every stage is a command that is printed, is skipped when it is done, and
goes on from its last checkpoint when it was stopped.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.demo import run, train  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Teach a real language model a small task, then distil it on-policy."
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs"), help="parent of all run directories (%(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the questions and the sampling (%(default)s)"
    )
    arguments = parser.parse_args()
    out, seed, started = arguments.out, arguments.seed, time.monotonic()
    try:
        print("\n== 1 of 4: the model, once for all checkouts", flush=True)
        model = make_model()
        for number, (title, command) in enumerate(stages(out, seed, model), start=2):
            print(f"\n== {number} of 4: {title}", flush=True)
            run(command)
    except subprocess.CalledProcessError as error:
        print(
            f"demo: stopped (exit code {error.returncode}); the same command goes on from here",
            file=sys.stderr,
        )
        return abs(error.returncode)
    summarise(out / "demo_real")
    print(f"took {(time.monotonic() - started) / 60:.1f} minutes")
    return 0


def make_model() -> Path:
    command = [sys.executable, str(ROOT / "tools" / "make_real_model.py")]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    print(done.stdout, end="")
    return Path(done.stdout.strip())


def stages(out: Path, seed: int, model: Path) -> list[tuple[str, list[str] | str]]:
    """Title and command of each that follows the model; a text says why there is nothing to do."""
    task, teacher = out / "demo_real_task", out / "demo_real_teacher"
    make = [
        sys.executable,
        str(ROOT / "tools" / "make_real_task.py"),
        "--out",
        str(task),
        "--seed",
        str(seed),
    ]
    shared = [f"student.path={model}", f"data.train={task / 'train.jsonl'}"]
    heldout = f"data.heldout={task / 'heldout.jsonl'}"
    return [
        ("the task", f"{task} is there already" if (task / "heldout.jsonl").exists() else make),
        (
            "the teacher: the model learns from 768 answered questions",
            train(teacher.name, out, seed, shared),
        ),
        (
            "on-policy distillation: the same model answers, and learns what the teacher would "
            "have written",
            train("demo_real", out, seed, [*shared, heldout, f"teacher.path={teacher / 'hf'}"]),
        ),
    ]


def summarise(directory: Path) -> None:
    """Accuracy on the held-out questions with its 95 % interval, at every evaluation."""
    print("\n== the student on held-out questions, greedy")
    for path in sorted((directory / "heldout").glob("step-*.jsonl")):
        rewards = [json.loads(line)["reward"] for line in path.read_text().splitlines()]
        low, high = wilson(sum(rewards) / len(rewards), len(rewards))
        step, right = int(path.stem.removeprefix("step-")), round(sum(rewards))
        print(f"after {step:2} steps: {right:3} of {len(rewards)} right, {low:.0%} to {high:.0%}")
    print(f"report   {directory / 'report.html'}")
    print(f"student  {directory / 'hf'}")


def wilson(share: float, count: int) -> tuple[float, float]:
    """The interval in which a share of `count` lies with 95 % (Wilson 1927)."""
    z2 = 1.96**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = math.sqrt(z2 * (share * (1 - share) + z2 / (4 * count)) / count) / (1 + z2 / count)
    return middle - half, middle + half


if __name__ == "__main__":
    sys.exit(main())
