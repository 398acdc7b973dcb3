"""Every method of the catalogue on one task at one budget, from a teacher of the student's family
and from a stranger.

    python benchmarks/method_table.py [--seeds 0 1 2]

The task is the demo's: two-digit sums with worked columns. The near teacher works as the student
does (`13,13` for 47+86, lowest column first). The distant one was taught another way of working
(`120+13`, tens first) for nine sums in ten: it can read what the student writes, but would hardly
write it itself, although it is right as often. Every method gets the same start, steps, samples and
learning rate; the weights of teacher terms beside rewards, which the papers chose for a learning
rate of 1e-6, are raised (CHANGES).

Writes JSON, docs/method_table.md and its picture. About half a minute per run on two cores, two at
a time; what is finished is not repeated.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.tgpo_vs_grpo import execute  # noqa: E402
from megatron_opd.methods.catalogue import CATALOGUE  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "method_table.json"
PAGE = ROOT / "docs" / "method_table.md"
PICTURE = ROOT / "docs" / "images" / "method_table.png"
FAMILIES = ("near", "distant")
STEPS = 40
# runs per process, which saves their start; gloo leaves threads of every run behind, which spin
TOGETHER = 3
BUDGET = [
    f"num_steps={STEPS}",
    "rollout.num_prompts=32",
    "rollout.samples_per_prompt=4",
    "train.optimizer.lr=1e-3",
    "train.optimizer.warmup_steps=5",
    "student.layout.tensor_model_parallel_size=1",
    "checkpoint.every=0",
    "log.tensorboard=false",
    "log.rollouts_per_step=0",
    "eval={every: 0, num_prompts: 200}",
]
_GUIDANCE = "method.guidance.weight="
CHANGES = {
    "tgpo": [f"{_GUIDANCE}0.1"],
    # 0 after two thirds of the steps
    "tgpo_annealing": [f"{_GUIDANCE}{{start: 0.2, decay: 0.0075}}"],
    "kdrl": ["method.distil.weight=0.1"],
    "kdrl_annealing": ["method.distil.weight={start: 0.25, decay: 0.00625, floor: 0.05}"],
    "kdrl_response_mask": ["method.distil.weight=0.1"],
    "kdrl_group_mask": ["method.distil.weight=0.1"],
    "prime": ["method.policy.advantages.process.lr=1e-3"],
    "opd_then_rl": ["method.distil.weight.at=20", "method.policy.weight.at=20"],
    "reopold_2stage": ["method.above_floor.weight.at=13", "method.uncertain.weight.at=13"],
    "luffy": ["rollout.samples_per_prompt=3"],  # with the trace a group of 4
} | {name: [f"method.prefix.steps={STEPS}"] for name in CATALOGUE if name.startswith("tropd")}


def main() -> None:
    parser = argparse.ArgumentParser(description="Every method, two teachers, several seeds.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--methods", nargs="+", default=list(CATALOGUE), choices=list(CATALOGUE), metavar="METHOD"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/bench/method_table"),
        help="of the runs (%(default)s)",
    )
    parser.add_argument("--worker", choices=FAMILIES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker, arguments.seeds[0], arguments.methods, arguments.out)
        return
    for seed in arguments.seeds:
        prepare(arguments.out / f"seed{seed}", seed)
        for first in range(0, len(arguments.methods), TOGETHER):
            methods = arguments.methods[first : first + TOGETHER]
            if not unfinished(arguments.out, seed, methods):
                continue
            both = [
                subprocess.Popen(command(family, seed, methods, arguments.out), env=one_thread())
                for family in FAMILIES
            ]
            if any([process.wait() for process in both]):
                sys.exit("a worker failed; the same command goes on from here")
    results = collect(arguments.out, arguments.seeds)
    RESULTS.write_text(
        json.dumps({"steps": STEPS, "seeds": arguments.seeds, "results": results}, indent=1) + "\n"
    )
    from benchmarks.method_table_page import write_page

    print(write_page(results, arguments.seeds, PAGE, PICTURE))


def unfinished(out: Path, seed: int, methods: list[str]) -> bool:
    return any(
        not result(out, seed, family, method).exists() for family in FAMILIES for method in methods
    )


def result(out: Path, seed: int, family: str, method: str) -> Path:
    return out / f"seed{seed}" / family / f"{method}.json"


def command(family: str, seed: int, methods: list[str], out: Path) -> list[str]:
    given = ["--methods", *methods, "--out", str(out), "--seeds", str(seed)]
    return [sys.executable, __file__, *given, "--worker", family]


def one_thread() -> dict[str, str]:
    return dict(os.environ) | {"OMP_NUM_THREADS": "1"}


# -------------------------------------------------------------------------------- teachers and data
def prepare(out: Path, seed: int) -> None:
    """The demo's data, teacher and start; then the stranger, taught the same sums worked in another
    way."""
    demo = [
        sys.executable,
        str(ROOT / "tools" / "demo.py"),
        "--out",
        str(out),
        "--seed",
        str(seed),
        "--teacher-only",
    ]
    execute(demo)
    assets, distant = out / "demo_assets", out / "distant"
    traces = assets / "train_distant.jsonl"
    if not traces.exists():
        rows = [json.loads(line) for line in (assets / "train.jsonl").read_text().splitlines()]
        worked = [row if i % 10 == 0 else tens_first(row) for i, row in enumerate(rows)]
        traces.write_text("".join(json.dumps(row) + "\n" for row in worked))
    if not (distant / "hf").exists():
        shutil.rmtree(distant, ignore_errors=True)
        settings = [
            f"student.path={assets / 'teacher'}",
            f"data.train={traces}",
            f"seed={seed}",
            f"run_dir={distant}",
        ]
        execute(
            [
                sys.executable,
                "-m",
                "megatron_opd",
                "train",
                "demo_teacher",
                *settings,
                "--nproc",
                "2",
            ]
        )


def tens_first(row: dict[str, str]) -> dict[str, str]:
    """47+86= is answered by `120+13 \\boxed{133}`."""
    a, b = map(int, row["problem"].rstrip("=").split("+"))
    tens, units = 10 * (a // 10 + b // 10), a % 10 + b % 10
    return row | {"response": f"{tens}+{units} \\boxed{{{a + b}}}"}


# --------------------------------------------------------------------------------------------- runs
def worker(family: str, seed: int, methods: list[str], out: Path) -> None:
    for method in methods:
        finished = result(out, seed, family, method)
        if not finished.exists():
            start = time.perf_counter()
            row = one_run(family, seed, method, out / f"seed{seed}")
            finished.parent.mkdir(parents=True, exist_ok=True)
            finished.write_text(json.dumps(row))
            gain = "failed" if "failed" in row else f"{100 * row['gain']:+.1f} points"
            print(
                f"{family} seed {seed} {method}: {gain}, {time.perf_counter() - start:.0f} s",
                flush=True,
            )


def one_run(family: str, seed: int, method: str, out: Path) -> dict[str, Any]:
    """The numbers of one run; a run that ends with an error is a result too."""
    from megatron_opd.errors import RunError
    from megatron_opd.loop import train
    from megatron_opd.recipe.load import load_config

    assets, directory = out / "demo_assets", out / family / method
    shutil.rmtree(directory, ignore_errors=True)
    teacher, traces = (
        ("demo_teacher", "train") if family == "near" else ("distant", "train_distant")
    )
    paths = [
        f"student.path={out / 'demo_student_start' / 'hf'}", f"teacher.path={out / teacher / 'hf'}",
        f"data.train={assets / traces}.jsonl", f"data.heldout={assets / 'heldout.jsonl'}",
    ]  # fmt: skip
    overrides = [
        f"method={method}",
        *paths,
        *BUDGET,
        *CHANGES.get(method, []),
        f"seed={seed}",
        f"run_dir={directory}",
    ]
    config = load_config(str(ROOT / "recipes" / "demo.yaml"), overrides)
    failed = {}
    try:
        train(config, resume=False)
    except RunError as error:
        failed = {"failed": str(error)}
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(directory)
    return measure(rows) | failed


def measure(rows: list[dict[str, float]]) -> dict[str, Any]:
    steps = [row for row in rows if "train/grad_norm" in row]
    first, last = rows[0], rows[-1]
    norms = [row["train/grad_norm"] for row in steps]
    return {
        "before": first["eval/accuracy"],
        "after": last.get("eval/accuracy", 0.0),
        "gain": last.get("eval/accuracy", 0.0) - first["eval/accuracy"],
        "tokens_before": first["eval/completion_tokens/mean"],
        "tokens_after": last.get("eval/completion_tokens/mean", float("nan")),
        "grad_norm_mean": mean(norms),
        "grad_norm_max": max(norms),
        "reward": [row.get("reward/mean", 0.0) for row in steps],
        "step_seconds": mean(row["timing/step_seconds"] for row in steps[1:]),
    }


def collect(out: Path, seeds: list[int]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """family -> method -> one row per seed."""
    return {
        family: {
            method: [json.loads(result(out, seed, family, method).read_text()) for seed in seeds]
            for method in CATALOGUE
            if all(result(out, seed, family, method).exists() for seed in seeds)
        }
        for family in FAMILIES
    }


if __name__ == "__main__":
    main()
