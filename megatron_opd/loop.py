"""The algorithm, on one screen: sample, verify, ask the teacher, update, refit the sampler."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from megatron_opd.contracts.rows import Row, StepRecord
from megatron_opd.contracts.signals import Signals
from megatron_opd.evaluation.heldout import held_out
from megatron_opd.mcore.batch import Columns
from megatron_opd.metrics.summary import Clock, summarise
from megatron_opd.objective.batch import Batch
from megatron_opd.objective.columns import build_columns
from megatron_opd.objective.loss import finish
from megatron_opd.objective.process_reward import process_columns
from megatron_opd.recipe.keys import RunConfig
from megatron_opd.runs.assemble import Models
from megatron_opd.runs.collect import collect
from megatron_opd.runs.roles import run_in_role
from megatron_opd.runs.run import Run, open_run


def train(config: RunConfig, *, resume: bool) -> None:
    """Runs a recipe to its end; every process of the run calls this.

    Raises Interrupted after Ctrl-C or SIGTERM, once the step is finished and saved.
    """
    run_in_role(config, partial(_train, config, resume=resume))


def _train(config: RunConfig, *, resume: bool) -> None:
    with open_run(config, resume=resume) as run:
        for step in range(run.step, config.num_steps):
            record = one_step(run, step)
            run.log(record)
            run.finish_step(step)
        run.log(StepRecord(config.num_steps, held_out(run, config.num_steps)))
        run.export()
        run.report()


def one_step(run: Run, step: int) -> StepRecord:
    metrics = held_out(run, step) if run.evaluates_at(step) else {}
    clock = Clock()
    rows = collect(run, step, clock)  # generate, verify, gather
    run.rest_engine()
    with clock("teacher"):
        signals = run.signals(rows, step)
    with clock("train"):
        signals = replace(
            signals, student=run.trainer.signals(rows) if run.needs.student_pass else None
        )
        updates = run.trainer.step(rows, partial(columns, run, rows, signals, step), step=step)
        metrics |= learn_rewards(run, rows, signals, step)
    with clock("refit"):
        if run.needs.rollouts:
            metrics |= run.refit(step + 1)
    weights = run.objective.weights(step)
    metrics |= (
        summarise([finish(sums) for sums in updates], rows, signals.teacher, weights)
        | clock.metrics()
    )
    return StepRecord(step, metrics, rows, signals.teacher)


def learn_rewards(models: Models, rows: list[Row], signals: Signals, step: int) -> dict[str, float]:
    """Updates the process model, whose earlier logprobs the student's update has used."""
    if models.process is None or signals.process_logprobs_T is None:
        return {}
    batch = batch_of(models.config, rows, signals, step)
    return models.process.learn(rows, process_columns(batch), step=step)


def columns(
    models: Models, rows: list[Row], signals: Signals, step: int, mine: slice, tokens: slice
) -> Columns:
    """What the terms read, of the part of the rows that makes one update."""
    batch = batch_of(models.config, rows[mine], signals.part(tokens), step)
    return build_columns(models.config.method, batch)


def batch_of(config: RunConfig, rows: Sequence[Row], signals: Signals, step: int) -> Batch:
    return Batch(
        rows,
        signals,
        config.seed,
        step,
        max_completion_tokens=config.rollout.max_completion_tokens,
    )
