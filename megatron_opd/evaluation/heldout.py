"""Accuracy on the held-out prompts: inside a run, and of a model directory on its own."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_opd.architectures.config import ModelConfig
from megatron_opd.contracts.rows import Row, Task
from megatron_opd.contracts.sampling import Draw
from megatron_opd.contracts.stations import Sampler, Verifier
from megatron_opd.evaluation.sampler import open_model
from megatron_opd.metrics.console import held_out_words
from megatron_opd.metrics.interval import interval_95
from megatron_opd.metrics.summary import bad_golds, unanswered
from megatron_opd.recipe.keys import EvalConfig, RunConfig
from megatron_opd.tasks.data import load_heldout
from megatron_opd.tasks.data_files import shown
from megatron_opd.tasks.tokenizer import load_tokenizer
from megatron_opd.world.processes import gather_shares, share

# steps never reach it: the draws of an evaluation are not those of a training step
_EVAL_STREAM = 1 << 20


@dataclass(frozen=True)
class HeldOut:
    """The held-out tasks of a run, which the present weights answer."""

    sampler: Sampler
    verifier: Verifier
    tasks: Sequence[Task]
    config: RunConfig
    settings: EvalConfig

    def due(self, step: int) -> bool:
        """True when the recipe asks for an evaluation before `step`."""
        every = self.settings.every
        return step == 0 or (every > 0 and step % every == 0)

    def answers(self, version: int) -> list[list[Row]]:
        """The answers to every task with the weights of `version`, the same on every rank.
        Collective."""
        draw = draw_of(self.config, self.settings, version)
        return gather_shares(answers(self.sampler, self.verifier, share([*self.tasks]), draw))


def draw_of(config: RunConfig, settings: EvalConfig, version: int) -> Draw:
    return Draw(
        seed=config.seed,
        step=_EVAL_STREAM,
        version=version,
        samples=settings.samples_per_prompt,
        max_tokens=config.rollout.max_completion_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
    )


def answers(
    sampler: Sampler, verifier: Verifier, tasks: Sequence[Task], draw: Draw
) -> list[list[Row]]:
    """Scored completions, one list per task."""
    scored = verifier.score(sampler.sample(tasks, draw))
    return [scored[i : i + draw.samples] for i in range(0, len(scored), draw.samples)]


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
    tokenizer = load_tokenizer(model.path)
    tasks = load_heldout(config, tokenizer)
    with open_model(config, model, tokenizer) as (sampler, verifier):
        answered = answers(sampler, verifier, tasks, draw_of(config, settings, version=0))
        metrics = accuracy(answered, settings)
    for name, value in metrics.items():
        print(f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}")
    print(held_out_words(metrics))
    print(f"({len(tasks)} prompts of {shown(heldout.path)}, temperature {settings.temperature:g})")
    return metrics
