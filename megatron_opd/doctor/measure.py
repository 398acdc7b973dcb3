"""The doctor's measurements: real updates and a real refit on a shrunk recipe, on its layout."""

import contextlib
import importlib.util
from dataclasses import replace
from typing import Any

import numpy as np

from megatron_opd.architectures.architecture import architecture_of
from megatron_opd.contracts.rows import Row
from megatron_opd.contracts.sampling import Draw
from megatron_opd.doctor.rows import recorded, with_logprobs
from megatron_opd.doctor.shrink import OTHER
from megatron_opd.methods.needs import distances_of, needs_of
from megatron_opd.recipe.keys import RunConfig
from megatron_opd.runs.assemble import assemble
from megatron_opd.runs.learner import Learner, learn
from megatron_opd.world import processes

STEPS = 2  # the second shows whether the first moved the weights in the right direction
Metrics = dict[str, float]


def measure(config: RunConfig) -> dict[str, Any]:
    """The measurements that `judge` reads, in every process of the recipe's layout."""
    vocab_size = architecture_of(config.student).vocab_size
    rows = recorded(config, vocab_size)
    measured: dict[str, Any] = {"updates": measure_updates(config)}
    if config.teacher:
        other = replace(config.teacher, path=config.teacher.path + OTHER)
        learner = assemble(replace(config, teacher=other))
        measured["other_teacher"] = updates(learner, rows, steps=1)
    method = distances_of(config.method, vocab_size)
    if method and config.teacher:
        distances = replace(config, method=method)
        layout = replace(
            config.teacher.layout, expert_model_parallel_size=1, expert_tensor_parallel_size=1
        )
        itself = replace(
            distances,
            teacher=replace(config.teacher, **(vars(config.student) | {"layout": layout})),
        )
        measured["own_teacher"] = _on_policy(itself, vocab_size)
        measured["distance"] = _on_policy(distances, vocab_size)
    if needs_of(config.method).rollouts and importlib.util.find_spec("vllm"):
        measured["refit"] = refit(config, rows)
    return measured


def measure_updates(config: RunConfig) -> list[Metrics]:
    """The metrics of STEPS steps, which must not depend on the layout."""
    rows = recorded(config, architecture_of(config.student).vocab_size)
    return updates(assemble(config), rows, steps=STEPS)


def updates(learner: Learner, rows: list[Row], *, steps: int) -> list[Metrics]:
    """The metrics of every update of some steps on the same rows."""
    metrics = []
    for step in range(steps):
        signals = learner.judges.signals(rows, step)
        metrics += learn(learner, rows, signals, step)[0]
    return metrics


def _on_policy(config: RunConfig, vocab_size: int) -> list[Metrics]:
    """One update on rows that the student could have sampled: no ratio is other than 1."""
    learner = assemble(config)
    rows = recorded(config, vocab_size)
    rows = with_logprobs(rows, learner.trainer.signals(rows).logprobs_T)
    return updates(learner, rows, steps=1)


def refit(config: RunConfig, rows: list[Row]) -> Metrics:
    """The recipe's engines get the student's weights, then those of another one, and sample.

    `mean` and `max` are differences (nats) of their logprobs from those of the trainer, `stale` is
    the mean difference from those of the first weights.
    """
    from megatron_opd.refit.push import Refit
    from megatron_opd.rollout.open import open_engine
    from megatron_opd.rollout.single_turn import SingleTurn
    from megatron_opd.tasks.tokenizer import load_tokenizer

    moved = replace(config, student=replace(config.student, path=config.student.path + OTHER))
    learner = assemble(moved)
    before = assemble(config)
    draw = Draw(
        seed=0,
        step=1,
        version=1,
        samples=2,
        max_tokens=config.rollout.max_completion_tokens,
        temperature=config.rollout.temperature,
    )
    with contextlib.ExitStack() as closing:
        engine = open_engine(config, processes.channel("rollout"), closing)
        for version, student in enumerate((before, learner)):
            Refit(student.tensors, engine).send(version)
        tasks = list({r.task.index: r.task for r in rows}.values())
        sampler = SingleTurn(engine, load_tokenizer(config.student.path))
        share = sampler.sample(processes.share(tasks), draw)
    sampled = processes.gather_shares(share)
    logprobs_T = np.concatenate([r.logprobs for r in sampled])
    difference_T = np.abs(logprobs_T - learner.trainer.signals(sampled).logprobs_T)
    stale_T = np.abs(logprobs_T - before.trainer.signals(sampled).logprobs_T)
    return {
        "mean": float(difference_T.mean()),
        "max": float(difference_T.max()),
        "stale": float(stale_T.mean()),
        "tokens": len(difference_T),
    }
