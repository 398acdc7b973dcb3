"""One queue over all engines against fixed shares, and how quickly mathematics is graded.

    python benchmarks/bench_throughput.py [--repeat 3] [--answers 10000]

A tiny random model that never ends by itself writes a set whose lengths are skewed: few long
samples, many short ones, which fixed shares give to one engine or the other by chance. Two
processes have an engine each. The bound is the larger of two times: the longest sample alone, and
all tokens at the rate of both engines with nothing but short samples. The target is at most 1.15
of it.

Then invented answers are graded by two workers: numbers, fractions, powers of ten and expressions,
every question with 20 samples of which some are alike. The target is 10,000 in 60 s.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.turns import report  # noqa: E402
from megatron_opd.contracts.rows import Task  # noqa: E402
from megatron_opd.contracts.sampling import Request, Sampling  # noqa: E402
from megatron_opd.contracts.suites import Answer, Asked, Question, SuiteProtocol  # noqa: E402
from megatron_opd.recipe.keys import RolloutConfig  # noqa: E402
from megatron_opd.recipe.rewards import RewardConfig  # noqa: E402
from megatron_opd.verify.graders.open import open_graders  # noqa: E402

LONG, SHORT = 400, 16  # tokens of a sample
LONG_SAMPLES, SHORT_SAMPLES = 8, 512
PLACES = 64  # of an engine
PROCESSES = 2
SAMPLING = Sampling(0, 1.0)


def requests(lengths: Iterable[int]) -> list[Request]:
    """A request of every length; the longest first, as `bench` orders them."""
    made = []
    for number, length in enumerate(sorted(lengths, reverse=True)):
        ids = np.array([2 + number % 50, 3, 4, 5], np.int32)
        made.append(Request(Task(number, "", "", "", ids), ids, length, seed=number))
    return made


def skewed() -> list[Request]:
    """A few long ones at random places behind one another, many short ones."""
    return requests([LONG] * LONG_SAMPLES + [SHORT] * SHORT_SAMPLES)


def work(model: str, repeat: int) -> None:
    """One of the processes: prints, on the first, the seconds of every side as JSON."""
    import torch.distributed as dist

    from megatron_opd.architectures.config import ModelConfig
    from megatron_opd.rollout.vllm.engine import VllmEngine
    from megatron_opd.world import processes
    from megatron_opd.world.queue import shared_items

    processes.start()
    rank = dist.get_rank()
    engine = VllmEngine(
        ModelConfig(model),
        RolloutConfig(kv_cache_gib=0.25),
        precision="float32",
        max_sequence_length=LONG + 32,
        seed=0,
        sleeps=False,
    )
    engine._ends = []  # lengths are those that are asked for
    engine._llm.llm_engine.vllm_config.scheduler_config.max_num_seqs = PLACES

    def drawn(items: Iterable[Request]) -> None:
        written = 0
        for _, completion in engine.stream((request, SAMPLING) for request in items):
            written += len(completion.token_ids)

    shuffled = skewed()
    random.Random(1).shuffle(shuffled)
    shorts = requests([SHORT] * (SHORT_SAMPLES + LONG_SAMPLES * LONG // SHORT))
    sides: dict[str, Callable[[str], None]] = {
        "one queue": lambda name: drawn(shared_items(name, skewed())),
        "fixed shares": lambda name: drawn(shuffled[rank::PROCESSES]),
        "tokens alone": lambda name: drawn(shorts[rank::PROCESSES]),
        "longest sample alone": lambda name: drawn(skewed()[:1]),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeat + 1):
        for name, side in sides.items():
            dist.barrier()
            start = time.perf_counter()
            side(f"{name} {turn}")
            dist.barrier()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    if rank == 0:
        print(json.dumps(seconds), flush=True)
    engine.close()
    processes.stop()


def queue(repeat: int) -> dict[str, Any]:
    """The seconds of the sides, and their ratio to the bound."""
    from tests.e2e import tiny_hf

    with tempfile.TemporaryDirectory() as folder:
        tiny_hf.write(tiny_hf.build("qwen3", seed=0), Path(folder))
        command = [sys.executable, "-m", "megatron_opd.world.torchrun", str(PROCESSES), __file__]
        ended = subprocess.run(
            [*command, "--model", folder, "--repeat", str(repeat)],
            env=dict(os.environ) | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    line = next(line for line in reversed(ended.stdout.splitlines()) if line.startswith("{"))
    seconds: dict[str, list[float]] = json.loads(line)
    bounds = zip(seconds["tokens alone"], seconds["longest sample alone"], strict=True)
    bound = [max(pair) for pair in bounds]
    ratios = {}
    for name in ("one queue", "fixed shares"):
        ratios[name] = [one / of for one, of in zip(seconds[name], bound, strict=True)]
    return {"seconds": seconds, "bound": bound, "ratios": ratios}


def answers(count: int) -> list[Answer]:
    """Invented answers, 20 of every question, right and wrong."""
    rng = random.Random(0)
    made = []
    for number in range(count // 20):
        kind = number % 5
        value = rng.randint(2, 9999)
        gold = str(value)
        if kind == 1:
            gold = rf"\frac{{{value}}}{{{value + 1}}}"
        elif kind == 2:
            gold = f"{value}e{rng.randint(3, 30)}"
        elif kind == 3:
            gold = rf"x^2+{value}x"
        elif kind == 4:
            gold = rf"{value}\sqrt{{{rng.choice((2, 3, 5, 7))}}}"
        question = Question(str(number), f"Question {number}", gold)
        for sample in range(20):
            text = gold if sample % 2 else f"{value + sample % 7}"
            asked = Asked(question, sample, question.text, gold)
            made.append(Answer(asked, f"So it is \\boxed{{{text}}}.", truncated=False))
    return made


def grading(count: int, repeat: int) -> dict[str, Any]:
    """Seconds of grading, with workers that have started."""
    protocol = SuiteProtocol("own", 20, 1.0, 1.0, 64, "{problem}")
    given = answers(count)
    seconds = []
    with ExitStack() as closing:
        config = RewardConfig(workers=PROCESSES)
        grader = open_graders({"own": protocol}, config, closing)["own"]
        grader.grade(given[:100])
        for _ in range(repeat):
            start = time.perf_counter()
            verdicts = grader.grade(given)
            seconds.append(time.perf_counter() - start)
    right = sum(bool(verdict.correct) for verdict in verdicts)
    return {"answers": len(given), "workers": PROCESSES, "right": right, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description="One queue over engines; grading.")
    parser.add_argument("--repeat", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--answers", type=int, default=10_000, help="default: %(default)s")
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/bench.json")
    arguments = parser.parse_args()
    if arguments.model:
        work(arguments.model, arguments.repeat)
        return
    results = {
        "queue": queue(arguments.repeat),
        "grading": grading(arguments.answers, arguments.repeat),
    }
    table = Table(title=f"median of {arguments.repeat}")
    for head in ("", "seconds", "of the bound", "least to most"):
        table.add_column(head, justify="left" if not head else "right")
    for name, seconds in results["queue"]["seconds"].items():
        ratios = results["queue"]["ratios"].get(name, [])
        ratio = f"{statistics.median(ratios):.2f}" if ratios else ""
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}" if ratios else ""
        table.add_row(name, f"{statistics.median(seconds):.2f}", ratio, spread)
    seconds = results["grading"]["seconds"]
    spread = f"{min(seconds):.1f} to {max(seconds):.1f} s"
    graded = f"{results['grading']['answers']:,} answers graded"
    table.add_row(graded, f"{statistics.median(seconds):.1f}", "", spread)
    report(table, results, arguments.out)


if __name__ == "__main__":
    main()
