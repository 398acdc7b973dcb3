"""The algorithm, on one screen: sample, verify, ask the teacher, update, refit the sampler."""

from functools import partial

from megatron_opd.contracts.rows import StepRecord
from megatron_opd.metrics.summary import Clock, summarise
from megatron_opd.recipe.keys import RunConfig
from megatron_opd.runs.book import Book
from megatron_opd.runs.evaluations import evaluations
from megatron_opd.runs.learner import learn
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
        at = run.stations
        book = run.book
        for step in range(run.step, config.num_steps):
            book.log(one_step(at, book, step))
            run.finish_step()
        book.log(StepRecord(config.num_steps, evaluations(at, book, config.num_steps)))
        book.export(at.learner.student, config.num_steps)
        book.report()


def one_step(at: Stations, book: Book, step: int) -> StepRecord:
    metrics = evaluations(at, book, step)
    clock = Clock()
    rows = at.rows(step, clock, book)  # generate, verify, gather
    if at.engine:
        # also in a step that sampled nothing after the last refit: the device is for the models now
        at.engine.sleep()
    with clock("teacher"):
        signals = at.learner.judges.signals(rows, step)
    with clock("train"):
        updates, of_process_model = learn(at.learner, rows, signals, step)
        metrics |= of_process_model
    with clock("refit"):
        if at.sender and at.needs.rollouts:
            metrics |= at.sender.send(step + 1).metrics
    weights = at.learner.objective.weights(step)
    metrics |= summarise(updates, rows, signals.teacher, weights)
    return StepRecord(step, metrics | clock.metrics(), rows, signals.teacher)
