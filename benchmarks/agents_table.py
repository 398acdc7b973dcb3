"""SDAR, its ablations and its baselines on the agents' demo, at one budget, over several seeds.

    python benchmarks/agents_table.py [--seeds 0 1 2 3 4] [--together 2]

The world is the demo's (two hidden tables; a student that can read skills and knows no world). All
variants of a seed have the same start, tasks, steps and learning rate. The weights that the papers
chose for a learning rate of 1e-6 are all raised by one factor, with which SDAR learns here; the
self-teacher keeps the weights of the start, as in the demo. A small engine samples
(`small_engine.py`), since vLLM's own steps would take longer than the model.

Writes JSON and docs/agents_table.md. What is finished is not repeated.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.tgpo_vs_grpo import execute  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "agents_table.json"
FACTOR = 500  # between the papers' weights beside rewards and those here
STEPS = 110
# processes take several runs, which saves their start
BUDGET = [
    f"num_steps={STEPS}",
    "rollout.engine=benchmarks.small_engine:SmallEngine",
    "checkpoint.every=0",
    "log.tensorboard=false",
    "log.rollouts_per_step=0",
    "eval.every=0",
    "eval.samples_per_prompt=16",
]
SDAR = f"method.sdar.weight={0.01 * FACTOR:g}"
SKILL_SD = f"method.distil.weight={1e-3 * FACTOR:g}"
LONGER = ["max_sequence_length=96", "student.max_position_embeddings=96"]
FULL = ["skills.retrieval=full", "skills.max_tokens=64", *LONGER]
# by name: the method, and the keys that it needs here
VARIANTS: dict[str, list[str]] = {
    "GRPO": ["method=grpo_agents"],
    "Skill-GRPO": ["method=grpo_agents", "skills.reader=student"],
    "SDAR": ["method=sdar", SDAR],
    "SDAR, entropy gate": ["method=sdar_entropy", SDAR],
    "SDAR, soft-OR gate": ["method=sdar_soft_or", SDAR],
    "SDAR, forward KL": ["method=sdar_fkl", SDAR],
    "SDAR, JSD": ["method=sdar_jsd", SDAR],
    "SDAR, reverse KL": ["method=sdar_rkl", SDAR],
    "OPSD": ["method=opsd", SDAR],
    "GRPO + OPSD": ["method=grpo_opsd", SDAR],
    "RLSD": ["method=rlsd"],
    "Skill-SD": ["method=skill_sd", SKILL_SD],
    "Skill-SD, bandit": ["method=skill_sd", SKILL_SD, "skills.retrieval=ucb"],
    "SDAR, bandit": ["method=sdar", SDAR, "skills.retrieval=ucb"],
    "SDAR, all skills": ["method=sdar", SDAR, *FULL],
    "SDAR, random skill": ["method=sdar", SDAR, "skills.retrieval=random"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description="SDAR and its baselines on the agents' demo.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--together", type=int, default=2, help="processes; default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/agents_table"))
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        for variant in arguments.variants:
            one_run(arguments.out, arguments.seeds[0], variant)
        return
    for seed in arguments.seeds:
        prepare(arguments.out / f"seed{seed}", seed)
        missing = []
        for variant in arguments.variants:
            if not result(arguments.out, seed, variant).exists():
                missing.append(variant)
        shares = [missing[n :: arguments.together] for n in range(arguments.together)]
        workers = [start(arguments.out, seed, share) for share in shares if share]
        if any([worker.wait() for worker in workers]):
            sys.exit("a worker failed; the same command goes on from here")
        write(arguments.out, arguments.seeds)


def result(out: Path, seed: int, variant: str) -> Path:
    return out / f"seed{seed}" / f"{variant}.json"


def prepare(out: Path, seed: int) -> None:
    """The demo's world and start, of this seed."""
    from tools.demo_agents import preparations

    for title, command in preparations(out, seed):
        if isinstance(command, list):
            print(f"seed {seed}: {title}", flush=True)
            execute(command)


def start(out: Path, seed: int, variants: Sequence[str]) -> "subprocess.Popen[bytes]":
    command = [sys.executable, __file__, "--worker", "--seeds", str(seed), "--out", str(out)]
    environment = dict(os.environ) | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, "--variants", *variants], env=environment)


def one_run(out: Path, seed: int, variant: str) -> None:
    """Trains; the numbers of the run. One that ends with an error is a result too."""
    from megatron_opd.errors import RunError
    from megatron_opd.loop import train
    from megatron_opd.recipe.load import load_config

    started = time.perf_counter()
    assets = out / f"seed{seed}"
    directory = assets / "run" / variant.replace(" ", "_").replace(",", "")
    shutil.rmtree(directory, ignore_errors=True)
    keys = [
        *VARIANTS[variant],
        f"student.path={assets / 'demo_agents_start' / 'hf'}",
        f"skills.bank={assets / 'demo_agents_assets' / 'skills'}",
        f"seed={seed}",
        f"run_dir={directory}",
    ]
    is_grpo = VARIANTS[variant][0] == "method=grpo_agents"
    recipe = "demo_agents_grpo" if is_grpo else "demo_agents"
    config = load_config(str(ROOT / "recipes" / f"{recipe}.yaml"), [*BUDGET, *keys])
    failed = {}
    try:
        train(config, resume=False)
    except RunError as error:
        failed = {"failed": str(error)}
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    row = measured([json.loads(line) for line in lines]) | failed
    shutil.rmtree(directory)
    path = result(out, seed, variant)
    path.with_suffix(".partial").write_text(json.dumps(row))
    path.with_suffix(".partial").replace(path)
    print(f"seed {seed} {variant}: {row['after']:.1%}, {time.perf_counter() - started:.0f} s")


def measured(rows: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Success before and after, without skills and with them, and the training's."""
    first = rows[0]
    last = rows[-1]
    won = [row["rollout/won/mean"] for row in rows if "rollout/won/mean" in row]
    return {
        "before": first["eval/accuracy"],
        "after": last.get("eval/accuracy", 0.0),
        "with_skills_before": first["eval/with_skills/accuracy"],
        "with_skills_after": last.get("eval/with_skills/accuracy", 0.0),
        "trained": sum(won[-10:]) / max(len(won[-10:]), 1),
        "won": won,
        "gap": [row["teacher/gap/mean"] for row in rows if "teacher/gap/mean" in row],
    }


def write(out: Path, seeds: Sequence[int]) -> None:
    """JSON and page, of what is finished."""
    from benchmarks.agents_table_page import write_page

    results: dict[str, dict[str, Any]] = {}
    for variant in VARIANTS:
        paths = {seed: result(out, seed, variant) for seed in seeds}
        finished = {seed: path for seed, path in paths.items() if path.exists()}
        if finished:
            results[variant] = {
                str(seed): json.loads(path.read_text()) for seed, path in finished.items()
            }
    RESULTS.write_text(json.dumps({"steps": STEPS, "results": results}, indent=1) + "\n")
    print(write_page(results))


if __name__ == "__main__":
    main()
