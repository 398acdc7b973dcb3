"""How much of the environments' own rate is left with a model between their steps.

    python benchmarks/agents.py [--repeat 3] [--cohorts 1 8 0]

Alone: every slot sends its next action as soon as its environment has answered. In the loop: the
sampler of a run plays the same episodes, with prompts, a tokenizer, and an engine that sleeps for
as long as the environments alone need for a batch of steps, in the place of a model. While it
sleeps for one cohort, the environments answer another; with 0 cohorts, those that it does not have.
The target is 90 % of the rate alone.

Two worlds: `timed` sleeps 60 ms a step, as ALFWorld works, and 600 ms on one step in 50; `workshop`
answers at once, so that what is measured is the way between the processes.
"""

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.timed_environment import TURNS  # noqa: E402
from benchmarks.turns import report  # noqa: E402
from megatron_opd.contracts.rows import Task  # noqa: E402
from megatron_opd.contracts.sampling import Completion, Draw, Request, Sampling  # noqa: E402
from megatron_opd.environments.open import open_dialogue, open_environments  # noqa: E402
from megatron_opd.environments.pool import EnvironmentPool  # noqa: E402
from megatron_opd.recipe.agents import EnvironmentConfig  # noqa: E402
from megatron_opd.recipe.data import TemplateConfig  # noqa: E402
from megatron_opd.rollout.episodes import Episodes  # noqa: E402
from megatron_opd.tasks.prompter import TemplatePrompter  # noqa: E402
from megatron_opd.tasks.tokenizer import load_tokenizer  # noqa: E402
from tests.unit.byte_tokenizer import write_byte_tokenizer  # noqa: E402

EPISODES = 64
ACTION = "<action> wait </action>"
WORLDS = {
    "timed": EnvironmentConfig("benchmarks.timed_environment:Timed", max_turns=TURNS, workers=8),
    "workshop": EnvironmentConfig(
        "workshop", options={"budget": TURNS}, max_turns=TURNS, workers=2
    ),
}


class SleepingModel:
    """An engine that writes the same action, and takes `seconds` for a turn of one episode."""

    max_sequence_length = 4096

    def __init__(self, token_ids: list[int], seconds: float) -> None:
        self._completion = Completion(token_ids, [0.0] * len(token_ids), "stop")
        self._seconds = seconds
        self.slept = 0.0

    def complete(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """The same completion for every request."""
        seconds = self._seconds * len(requests)
        self.slept += seconds
        time.sleep(seconds)
        return [self._completion] * len(requests)


def tasks(config: EnvironmentConfig) -> list[str]:
    """A task for every episode."""
    if config.kind == "workshop":
        return ["chill mug"] * EPISODES
    return [str(number) for number in range(EPISODES)]


def rate_alone(pool: EnvironmentPool, config: EnvironmentConfig, seed: int) -> float:
    """Steps per second of environments that wait for nobody, resets included."""
    start = time.perf_counter()
    left = {slot: TURNS for slot in range(EPISODES)}
    for slot, task_id in enumerate(tasks(config)):
        pool.reset(slot, task_id, seed)
    while left:
        for slot, observation in pool.ready(1.0):
            assert not observation.failed, observation.failed
            if left[slot]:
                left[slot] -= 1
                pool.step(slot, "wait")
            else:
                del left[slot]
    return EPISODES * TURNS / (time.perf_counter() - start)


def rate_in_loop(
    pool: EnvironmentPool, config: EnvironmentConfig, tokenizer: Any, seconds: float, seed: int
) -> tuple[float, float]:
    """Steps per second in the loop, and the share of the time in which the model worked."""
    model = SleepingModel(tokenizer.encode(ACTION), seconds)
    prompter = TemplatePrompter(TemplateConfig("raw"), tokenizer, "user")
    sampler = Episodes(
        model,  # type: ignore[arg-type]  # no weights
        pool,
        open_dialogue(replace(config, dialogue="megatron_opd.environments.plain:PlainDialogue")),
        prompter,
        tokenizer,
        config,
    )
    nothing = np.zeros(0, np.int32)
    drawn = [Task(n, task_id, "", "", nothing) for n, task_id in enumerate(tasks(config))]
    draw = Draw(seed, step=0, version=0, samples=1, max_tokens=64, temperature=1.0)
    start = time.perf_counter()
    rows = sampler.sample(drawn, draw)
    elapsed = time.perf_counter() - start
    assert len(rows) == EPISODES * TURNS, f"{len(rows)} rows"
    return len(rows) / elapsed, model.slept / elapsed


def measure(name: str, cohorts: Sequence[int], repeat: int, tokenizer: Any) -> dict[str, Any]:
    """The rates of a world, alone and in the loop with so many cohorts, which take turns."""
    config = WORLDS[name]
    alone: list[float] = []
    in_loop: dict[int, list[float]] = {count: [] for count in cohorts}
    busy: dict[int, list[float]] = {count: [] for count in cohorts}
    with contextlib.ExitStack() as closing:
        pool = open_environments(config, closing)
        rate_alone(pool, config, seed=0)  # its processes start
        for seed in range(repeat):
            alone.append(rate_alone(pool, config, seed))
            for count in cohorts:
                settings = replace(config, cohorts=count)
                rate, share = rate_in_loop(pool, settings, tokenizer, 1 / alone[-1], seed)
                in_loop[count].append(rate)
                busy[count].append(share)
    return {
        "world": name,
        "episodes": EPISODES,
        "turns": TURNS,
        "workers": config.workers,
        "alone_per_second": alone,
        "in_loop_per_second": {str(count): rates for count, rates in in_loop.items()},
        "model_works_share": {str(count): shares for count, shares in busy.items()},
        "ratios": {
            str(count): [rate / own for rate, own in zip(rates, alone, strict=True)]
            for count, rates in in_loop.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Environments alone and in the loop.")
    parser.add_argument("--repeat", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--cohorts", type=int, nargs="+", default=[1, 8, 0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/agents.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_byte_tokenizer(Path(folder))
        tokenizer = load_tokenizer(folder)
        results = [
            measure(name, arguments.cohorts, arguments.repeat, tokenizer) for name in WORLDS
        ]  # fmt: skip
    table = Table(title=f"{EPISODES} episodes of {TURNS} steps; median of {arguments.repeat}")
    for head in ("world", "cohorts", "alone, steps/s", "in the loop", "ratio", "least to most"):
        table.add_column(head, justify="left" if head == "world" else "right")
    for result in results:
        alone = statistics.median(result["alone_per_second"])
        for count, ratios in result["ratios"].items():
            rate = statistics.median(result["in_loop_per_second"][count])
            spread = f"{min(ratios):.0%} to {max(ratios):.0%}"
            ratio = f"{statistics.median(ratios):.0%}"
            table.add_row(result["world"], count, f"{alone:.0f}", f"{rate:.0f}", ratio, spread)
    report(table, results, arguments.out)


if __name__ == "__main__":
    main()
