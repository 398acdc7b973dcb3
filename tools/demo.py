"""The whole project on one machine: make a task, train a teacher and a student on it, distil, and
look at the result.

    python tools/demo.py                              # runs/demo_assets, runs/demo_teacher, ...
    python tools/demo.py --seed 1 --out runs/seed1    # another split, other initial weights
    python tools/demo.py --moe                        # a teacher with experts, runs/demo_moe

Every stage is a `megatron-opd` command that is printed before it runs. A stage that is done is
skipped, one that was stopped goes on from its last checkpoint.
"""

import argparse
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROCESSES = 2
ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Train a small teacher, then distil it into a smaller student."
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs"), help="parent of all run directories (%(default)s)"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of the data, the weights and the sampling (%(default)s)",
    )
    parser.add_argument("--moe", action="store_true", help="a mixture of experts teaches")
    parser.add_argument("--teacher-only", action="store_true", help="stop before the distillation")
    arguments = parser.parse_args()
    started = time.monotonic()
    try:
        for number, (title, command) in enumerate(
            stages(arguments.out, arguments.seed, arguments.moe), start=1
        ):
            if number == 4 and arguments.teacher_only:
                return 0
            print(f"\n== {number} of 4: {title}", flush=True)
            run(command)
    except subprocess.CalledProcessError as error:
        print(
            f"demo: stopped (exit code {error.returncode}); the same command goes on from here",
            file=sys.stderr,
        )
        return abs(error.returncode)
    summarise(arguments.out / ("demo_moe" if arguments.moe else "demo"), time.monotonic() - started)
    return 0


def stages(out: Path, seed: int, moe: bool = False) -> list[tuple[str, list[str] | str]]:
    """Title and command of each; a text in the place of a command says why there is nothing to
    do."""
    assets, start = out / "demo_assets", out / "demo_student_start" / "hf"
    demo, teacher, model = (
        ("demo_moe", "demo_moe_teacher", "teacher_moe")
        if moe
        else ("demo", "demo_teacher", "teacher")
    )
    data = [f"data.train={assets / 'train.jsonl'}"]
    make = [
        sys.executable,
        str(ROOT / "tools" / "make_demo.py"),
        "--out",
        str(assets),
        "--seed",
        str(seed),
    ]
    return [
        (
            "data, tokenizer and two randomly initialised models",
            f"{assets} is there already"
            if (assets / "student" / "tokenizer.json").exists()
            else make,
        ),
        (
            "the teacher learns two-digit addition from 6,000 worked examples",
            train(teacher, out, seed, [f"student.path={assets / model}", *data]),
        ),
        (
            "the student learns the format from 450 of them",
            train(
                "demo_student_start",
                out,
                seed,
                [
                    f"student.path={assets / 'student'}",
                    f"data.train={assets / 'student_start.jsonl'}",
                ],
            ),
        ),
        (
            "on-policy distillation: vLLM samples, math-verify scores, the teacher guides, "
            "Megatron updates",
            train(
                demo,
                out,
                seed,
                [
                    f"student.path={start}",
                    f"teacher.path={out / teacher / 'hf'}",
                    f"data.heldout={assets / 'heldout.jsonl'}",
                    *data,
                ],
            ),
        ),
    ]


def train(
    recipe: str, out: Path, seed: int, overrides: list[str], processes: int = PROCESSES
) -> list[str] | str:
    """The command that begins or continues a run, or why none is needed."""
    directory = out / recipe
    if (directory / "report.html").exists():
        return f"{directory} is finished already"
    resume = ["--resume"] if (directory / "config.yaml").exists() else []
    settings = [*overrides, f"seed={seed}", f"run_dir={directory}"]
    command = [
        sys.executable,
        "-m",
        "megatron_opd",
        "train",
        str(ROOT / "recipes" / f"{recipe}.yaml"),
        *settings,
    ]
    return [*command, "--nproc", str(processes), *resume]


def run(command: list[str] | str) -> None:
    if isinstance(command, str):
        print(command)
        return
    print(f"$ {shlex.join(command)}", flush=True)
    process = subprocess.Popen(command)
    with signals_passed_on([process]):
        code = process.wait()
    if code:
        raise subprocess.CalledProcessError(code, command)


@contextmanager
def signals_passed_on(processes: "Sequence[subprocess.Popen[Any]]") -> Iterator[None]:
    """Leaves the end of the block to the processes, which save first.

    A terminal's Ctrl-C reaches them too; SIGTERM is passed on.
    """

    def terminate(*_: object) -> None:
        for process in processes:
            process.terminate()

    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: None),
        signal.SIGTERM: signal.signal(signal.SIGTERM, terminate),
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def summarise(directory: Path, seconds: float) -> None:
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    measured = [row for row in rows if "eval/accuracy" in row]
    before, after = measured[0], measured[-1]
    print(f"\n== the student on {held_out_count(directory)} held-out problems, greedy")
    print(
        f"accuracy before {before['eval/accuracy']:.1%}, after {after['step']} steps "
        f"{after['eval/accuracy']:.1%}"
    )
    same, total = compare_with_transformers(directory, after["step"])
    print(f"transformers, given {directory / 'hf'}, writes the same answer to {same} of {total}")
    print(f"report   {directory / 'report.html'}")
    print(f"samples  {directory / 'rollouts'}, {directory / 'heldout'}")
    print(f"student  {directory / 'hf'}")
    print(f"took {seconds / 60:.1f} minutes")


def held_out_count(directory: Path) -> int:
    return sum(1 for _ in (directory / "heldout" / "step-000000.jsonl").open())


def compare_with_transformers(directory: Path, step: int) -> tuple[int, int]:
    """How many of the run's greedy held-out answers `transformers` reproduces token by token, of
    how many."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    rows = [json.loads(line) for line in (directory / "heldout" / f"step-{step:06d}.jsonl").open()]
    model: Any = AutoModelForCausalLM.from_pretrained(directory / "hf").eval()
    by_length: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        by_length.setdefault(len(row["prompt_token_ids"]), []).append(row)
    same = 0
    for length, group in by_length.items():
        prompts = torch.tensor([row["prompt_token_ids"] for row in group])
        limits = {"max_new_tokens": max(len(row["token_ids"]) for row in group), "pad_token_id": 0}
        written = model.generate(
            prompts, attention_mask=torch.ones_like(prompts), do_sample=False, **limits
        )
        for row, ids in zip(group, written[:, length:].tolist(), strict=True):
            same += ids[: len(row["token_ids"])] == row["token_ids"]
    return same, len(rows)


if __name__ == "__main__":
    sys.exit(main())
