"""Accuracy on the held-out prompts: inside a run, and of a model directory on its own."""

import time
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from megatron_opd.architectures.config import ModelConfig
from megatron_opd.contracts.rows import Row, Task
from megatron_opd.contracts.stations import Engine, Verifier
from megatron_opd.evaluation.sampler import open_sampler
from megatron_opd.metrics.console import held_out_words
from megatron_opd.metrics.interval import interval_95
from megatron_opd.metrics.summary import bad_golds, unanswered
from megatron_opd.recipe.keys import EvalConfig, RunConfig
from megatron_opd.tasks.data import load_heldout
from megatron_opd.tasks.data_files import shown
from megatron_opd.tasks.tokenizer import load_tokenizer
from megatron_opd.world.processes import gather_shares, share

if TYPE_CHECKING:
    from megatron_opd.runs.run import Run

# steps never reach it: the draws of an evaluation are not those of a training step
_EVAL_STREAM = 1 << 20


def held_out(run: "Run", step: int) -> dict[str, float]:
    """The eval/* metrics of the weights at the start of `step`. Collective.

    {} when the recipe has no evaluation.
    """
    engine = run.engine
    rewards = run.rewards
    settings = run.config.eval
    if settings is None or engine is None or rewards is None:
        return {}
    start = time.perf_counter()
    run.note(f"evaluating {len(run.heldout)} held-out prompts before step {step}")
    if engine.policy_version != step:
        run.refit(step)
    tasks = share(run.heldout)
    scored = run.sampled(
        lambda: answers(engine, rewards, tasks, run.config, settings, version=step)
    )
    groups = gather_shares(scored)
    if run.sinks:
        run.sinks.log_heldout(step, [row for group in groups for row in group])
    return accuracy(groups, settings) | {"timing/eval_seconds": time.perf_counter() - start}


def answers(
    engine: Engine,
    rewards: Verifier,
    tasks: list[Task],
    config: RunConfig,
    settings: EvalConfig,
    *,
    version: int,
) -> list[list[Row]]:
    """Scored completions, one list per task."""
    flat = engine.generate(
        tasks,
        version=version,
        step=_EVAL_STREAM,
        samples_per_prompt=settings.samples_per_prompt,
        max_completion_tokens=config.rollout.max_completion_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=config.seed,
    )
    scored = rewards.score(flat)
    k = settings.samples_per_prompt
    return [scored[i : i + k] for i in range(0, len(scored), k)]


def accuracy(groups: list[list[Row]], settings: EvalConfig) -> dict[str, float]:
    """avg@k over the prompts with its 95 % interval, pass@k when k > 1, fractions of failures."""
    correct_NK = np.array([[float(bool(r.verdict.correct)) for r in group] for group in groups])
    rows = [row for group in groups for row in group]
    low, high = interval_95(correct_NK)
    metrics = {
        "eval/accuracy": float(correct_NK.mean()),
        "eval/accuracy/low": low,
        "eval/accuracy/high": high,
        "eval/prompts": len(groups),
        "eval/truncated/mean": float(np.mean([r.truncated for r in rows])),
        "eval/unanswered/mean": unanswered(rows),
        "eval/bad_gold": bad_golds(rows),
        "eval/completion_tokens/mean": float(np.mean([r.num_written for r in rows])),
    }
    if settings.samples_per_prompt > 1:
        metrics[f"eval/pass@{settings.samples_per_prompt}"] = float(correct_NK.max(axis=1).mean())
    return metrics


def evaluate_model(config: RunConfig, model: ModelConfig) -> dict[str, float]:
    """Evaluates a Hugging Face directory on the recipe's held-out prompts, in one process.

    Prints the metrics.
    """
    settings = config.eval or EvalConfig()
    heldout = config.data.heldout_set
    assert heldout is not None, "model_to_evaluate refuses a recipe without"
    config = replace(config, student=model)
    tasks = load_heldout(config, load_tokenizer(model.path))
    with open_sampler(config, model) as (engine, rewards):
        metrics = accuracy(answers(engine, rewards, tasks, config, settings, version=0), settings)
    for name, value in metrics.items():
        print(f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}")
    print(held_out_words(metrics))
    print(f"({len(tasks)} prompts of {shown(heldout.path)}, temperature {settings.temperature:g})")
    return metrics
