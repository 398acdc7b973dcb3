"""Accuracy on the held-out prompts: inside a run, and of a model directory on its own."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_opd.architectures.config import ModelConfig
from megatron_opd.contracts.rows import Row, Task, episodes_of, without_columns
from megatron_opd.contracts.sampling import Draw
from megatron_opd.contracts.stations import Sampler, Verifier
from megatron_opd.errors import RunError
from megatron_opd.evaluation.sampler import open_model
from megatron_opd.metrics.console import held_out_words, set_words
from megatron_opd.metrics.summary import bad_golds, by_reward, by_source, unanswered
from megatron_opd.metrics.turns import episode_metrics
from megatron_opd.recipe.keys import EvalConfig, RunConfig
from megatron_opd.statistics.intervals import difference_95, interval_95
from megatron_opd.tasks.data_files import shown
from megatron_opd.tasks.tokenizer import load_tokenizer
from megatron_opd.world.processes import gather_shares, share

# steps never reach it: the draws of an evaluation are not those of a training step
_EVAL_STREAM = 1 << 20


@dataclass(frozen=True)
class HeldOut:
    """The held-out tasks of a run, which the present weights answer."""

    # by the prefix of their metrics: "" for the model as it is, "with_skills/" with skills to read
    samplers: dict[str, Sampler]
    verifier: Verifier | None  # None: the environment judges
    tasks: Sequence[Task]
    config: RunConfig
    settings: EvalConfig
    name: str = ""  # of a further set

    @property
    def of(self) -> str:
        """What its metrics stand below in eval/."""
        return f"set/{self.name}/" if self.name else ""

    def due(self, step: int) -> bool:
        """True when the recipe asks for an evaluation before `step`."""
        every = self.settings.every
        return step == 0 or (every > 0 and step % every == 0)

    def answers(self, version: int) -> dict[str, list[list[Row]]]:
        """The rows of every task with the weights of `version`, by prefix, the same on every rank.
        Collective."""
        draw = draw_of(self.config, self.settings, version)
        own = share([*self.tasks])
        answered = {}
        for prefix, sampler in self.samplers.items():
            answered[prefix] = gather_shares(answers(sampler, self.verifier, own, draw))
        return answered


def draw_of(config: RunConfig, settings: EvalConfig, version: int) -> Draw:
    return Draw(
        seed=config.seed,
        step=_EVAL_STREAM,
        version=version,
        samples=settings.samples_per_prompt,
        max_tokens=config.rollout.max_completion_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        stop=tuple(config.rollout.stop),
    )


def answers(
    sampler: Sampler, verifier: Verifier | None, tasks: Sequence[Task], draw: Draw
) -> list[list[Row]]:
    """The judged rows of every task, one list per task."""
    rows = sampler.sample(tasks, draw)
    groups: list[list[Row]] = [[] for _ in tasks]
    for row in without_columns(verifier.score(rows)) if verifier else rows:
        groups[row.group].append(row)
    return groups


def measured(
    answered: dict[str, list[list[Row]]], settings: EvalConfig, of: str = ""
) -> dict[str, float]:
    """The metrics of every prefix, and the difference that skills make where there are both.

    `of` is what those of a further set stand below.
    """
    metrics: dict[str, float] = {}
    for prefix, groups in answered.items():
        for name, value in accuracy(groups, settings).items():
            metrics[name.replace("eval/", f"eval/{of}{prefix}", 1)] = value
    if len(answered) == 2:
        first_NK, second_NK = (correct(groups, settings) for groups in answered.values())
        both_N = ~(np.isnan(first_NK).all(axis=1) | np.isnan(second_NK).all(axis=1))
        first_N = np.nanmean(first_NK[both_N], axis=1)
        mean, low, high = difference_95(first_N, np.nanmean(second_NK[both_N], axis=1))
        metrics["eval/skills_difference"] = mean
        metrics |= {"eval/skills_difference/low": low, "eval/skills_difference/high": high}
    return metrics


def correct(groups: list[list[Row]], settings: EvalConfig) -> np.ndarray:
    """float64 [N, K], 1 for a right attempt at a task; NaN for one whose environment failed."""
    correct_NK = np.full((len(groups), settings.samples_per_prompt), np.nan)
    for number, group in enumerate(groups):
        for place, episode in enumerate(episodes_of(group)):
            if episode.ended != "failed":
                correct_NK[number, place] = float(bool(episode.verdict.correct))
    return correct_NK


def accuracy(groups: list[list[Row]], settings: EvalConfig) -> dict[str, float]:
    """avg@k over the prompts with its 95 % interval, pass@k when k > 1, fractions of failures.

    Raises RunError where every environment failed.
    """
    all_NK = correct(groups, settings)
    there_N = ~np.isnan(all_NK).all(axis=1)
    if not there_N.any():
        reason = groups[0][0].verdict.reason
        raise RunError(f"evaluation: every episode failed, the first by: {reason}")
    correct_NK = all_NK[there_N]
    rows = [row for group in groups for row in group if row.episode.ended != "failed"]
    low, high = interval_95(correct_NK)
    metrics = {
        "eval/accuracy": float(np.nanmean(correct_NK)),
        "eval/accuracy/low": low,
        "eval/accuracy/high": high,
        "eval/prompts": len(correct_NK),
        "eval/truncated/mean": float(np.mean([r.truncated for r in rows])),
        "eval/unanswered/mean": unanswered(rows),
        "eval/bad_gold": bad_golds(rows),
        "eval/completion_tokens/mean": float(np.mean([r.num_written for r in rows])),
    }
    if settings.samples_per_prompt > 1:
        best_N = np.nanmax(correct_NK, axis=1)
        metrics[f"eval/pass@{settings.samples_per_prompt}"] = float(best_N.mean())
    failed = int(np.isnan(all_NK).sum())
    metrics |= episode_metrics(rows, "eval") | ({"eval/failed": failed} if failed else {})
    metrics |= by_reward(episodes_of(rows), "eval") | _by_source(groups, all_NK)
    return metrics | _by_type([group[0].episode.task_type for group in groups], all_NK)


def _by_source(groups: list[list[Row]], all_NK: np.ndarray) -> dict[str, float]:
    """The accuracy and interval of every source of the data; {} where rows name none."""
    metrics: dict[str, float] = {}
    places = by_source(range(len(groups)), lambda place: groups[place][0].task.source)
    for source, own in places.items():
        there_NK = all_NK[own][~np.isnan(all_NK[own]).all(axis=1)]
        if len(there_NK):
            low, high = interval_95(there_NK)
            prefix = f"eval/source/{source}/accuracy"
            metrics |= {prefix: float(np.nanmean(there_NK)), f"{prefix}/low": low}
            metrics |= {f"{prefix}/high": high, f"eval/source/{source}/prompts": len(there_NK)}
    return metrics


def _by_type(task_types: Sequence[str], correct_NK: np.ndarray) -> dict[str, float]:
    """The interval of every type of task; {} where all are of one type."""
    metrics = {}
    for task_type in sorted(set(task_types)) if len(set(task_types)) > 1 else ():
        of_type = np.array([one == task_type for one in task_types])
        there = of_type & ~np.isnan(correct_NK).all(axis=1)
        if there.any():
            low, high = interval_95(correct_NK[there])
            metrics[f"eval/won/{task_type}/low"] = low
            metrics[f"eval/won/{task_type}/high"] = high
    return metrics


def evaluate_model(config: RunConfig, model: ModelConfig) -> dict[str, float]:
    """Evaluates a Hugging Face directory on the recipe's held-out prompts, in one process.

    Prints the metrics.
    """
    config = replace(config, student=model)
    tokenizer = load_tokenizer(model.path)
    metrics: dict[str, float] = {}
    sizes = {}
    with open_model(config, model, tokenizer) as opened:
        for name, tasks in opened.heldout().items():
            settings = config.evaluation_of(name)
            draw = draw_of(config, settings, version=0)
            answered = {}
            for prefix, sampler in opened.samplers(settings).items():
                answered[prefix] = answers(sampler, opened.verifier, tasks, draw)
            one = HeldOut({}, opened.verifier, tasks, config, settings, name)
            metrics |= measured(answered, settings, one.of)
            sizes[name] = f"({len(tasks)} prompts of {_tasks_of(config, name)}, temperature "
            sizes[name] += f"{settings.temperature:g})"
    for name, value in metrics.items():
        print(f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}")
    if "" in sizes:
        print(held_out_words(metrics))
    for words in (*set_words(metrics), *sizes.values()):
        print(words)
    return metrics


def _tasks_of(config: RunConfig, name: str) -> str:
    if name:
        return shown(config.data.sets[name].path)
    if config.environment:
        return f"{config.environment.kind}, {config.environment.heldout}"
    heldout = config.data.heldout_set
    assert heldout is not None, "model_to_evaluate refuses a recipe without"
    return shown(heldout.path)
