"""The algorithm, on one screen: sample, verify, ask the teacher, update, refit the sampler."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from megatron_opd.contracts.rows import Row, StepRecord
from megatron_opd.contracts.signals import Signals, TeacherSignals
from megatron_opd.evaluation.heldout import accuracy
from megatron_opd.mcore.batch import Columns
from megatron_opd.metrics.summary import Clock, summarise
from megatron_opd.objective.batch import Batch
from megatron_opd.objective.columns import build_columns
from megatron_opd.objective.loss import finish
from megatron_opd.objective.process_reward import process_columns
from megatron_opd.recipe.keys import RunConfig
from megatron_opd.runs.assemble import Learner
from megatron_opd.runs.book import Book
from megatron_opd.runs.roles import run_in_role
from megatron_opd.runs.run import open_run
from megatron_opd.runs.stations import Stations


def train(config: RunConfig, *, resume: bool) -> None:
    """Runs a recipe to its end; every process of the run calls this.

    Raises Interrupted after Ctrl-C or SIGTERM, once the step is finished and saved.
    """
    run_in_role(config, partial(_train, config, resume=resume))


def _train(config: RunConfig, *, resume: bool) -> None:
    with open_run(config, resume=resume) as run:
        at, book = run.stations, run.book
        for step in range(run.step, config.num_steps):
            book.log(one_step(at, book, step))
            run.finish_step()
        book.log(StepRecord(config.num_steps, held_out(at, book, config.num_steps)))
        book.export(at.learner.student, config.num_steps)
        book.report()


def one_step(at: Stations, book: Book, step: int) -> StepRecord:
    metrics = held_out(at, book, step) if at.heldout and at.heldout.due(step) else {}
    clock = Clock()
    rows = at.rows(step, clock, book)  # generate, verify, gather
    if at.engine:
        # also in a step that sampled nothing after the last refit: the device is for the models now
        at.engine.sleep()
    learnt = learn(at.learner, rows, step, clock)
    metrics |= learnt.metrics
    with clock("refit"):
        if at.sender and at.needs.rollouts:
            metrics |= at.sender.send(step + 1).metrics
    weights = at.learner.objective.weights(step)
    metrics |= summarise(learnt.updates, rows, learnt.teacher, weights)
    return StepRecord(step, metrics | clock.metrics(), rows, learnt.teacher)


def held_out(at: Stations, book: Book, step: int) -> dict[str, float]:
    """The eval/* metrics of the weights at the start of `step`. Collective.

    {} when the recipe has no evaluation.
    """
    if at.heldout is None or at.engine is None or at.sender is None:
        return {}
    start = time.perf_counter()
    book.note(f"evaluating {len(at.heldout.tasks)} held-out prompts before step {step}")
    if at.engine.policy_version != step:
        at.sender.send(step)
    groups = at.heldout.answers(version=step)
    book.log_heldout(step, [row for group in groups for row in group])
    seconds = time.perf_counter() - start
    return accuracy(groups, at.heldout.settings) | {"timing/eval_seconds": seconds}


@dataclass(frozen=True)
class Learnt:
    """What the updates of a step report."""

    teacher: TeacherSignals | None
    updates: list[dict[str, float]]  # the metrics of every update
    metrics: dict[str, float]  # of the process model


def learn(learner: Learner, rows: list[Row], step: int, clock: Clock) -> Learnt:
    """Asks the judges and makes the updates of a step. Collective."""
    with clock("teacher"):
        signals = learner.judges.signals(rows, step)
    with clock("train"):
        if learner.needs.student_pass:
            signals = replace(signals, student=learner.trainer.signals(rows))
        build = partial(columns, learner.config, rows, signals, step)
        updates = learner.trainer.step(rows, build, step=step)
        metrics = _learn_rewards(learner, rows, signals, step)
    return Learnt(signals.teacher, [finish(sums) for sums in updates], metrics)


def _learn_rewards(
    learner: Learner, rows: list[Row], signals: Signals, step: int
) -> dict[str, float]:
    """Updates the process model, whose earlier logprobs the student's update has used."""
    process = learner.judges.process
    if process is None or signals.process_logprobs_T is None:
        return {}
    batch = batch_of(learner.config, rows, signals, step)
    return process.learn(rows, process_columns(batch), step=step)


def columns(
    config: RunConfig, rows: list[Row], signals: Signals, step: int, chosen: slice, tokens: slice
) -> Columns:
    """What the terms read, of the rows that make one update."""
    batch = batch_of(config, rows[chosen], signals.part(tokens), step)
    return build_columns(config.method, batch)


def batch_of(config: RunConfig, rows: Sequence[Row], signals: Signals, step: int) -> Batch:
    most = config.rollout.max_completion_tokens
    return Batch(rows, signals, config.seed, step, max_completion_tokens=most)
