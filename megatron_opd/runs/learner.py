"""The models of a run, and their work on the rows of a step."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from megatron_opd.contracts.rows import Row
from megatron_opd.contracts.signals import Signals
from megatron_opd.contracts.stations import Teacher
from megatron_opd.mcore.batch import Columns
from megatron_opd.methods.method import MethodConfig
from megatron_opd.methods.needs import active, needs_of
from megatron_opd.methods.part import Needs
from megatron_opd.objective.batch import Batch
from megatron_opd.objective.columns import build_columns
from megatron_opd.objective.loss import Objective, finish
from megatron_opd.objective.process_reward import process_columns
from megatron_opd.recipe.keys import RunConfig
from megatron_opd.trainer.process_reward import ProcessModel
from megatron_opd.trainer.step import Trainer
from megatron_opd.trainer.student import Student
from megatron_opd.trainer.weight_copy import WeightCopy
from megatron_opd.weights.export import iter_hf_tensors


@dataclass(frozen=True)
class Judges:
    """The models beside the student, which score the rows of a step."""

    method: MethodConfig
    teacher: Teacher | None
    reference: Teacher | None  # the student as the run found it
    process: ProcessModel | None  # trained beside the student, for rewards of every token

    def signals(self, rows: Sequence[Row], step: int) -> Signals:
        """The signals of the rows that a term with a weight at `step` reads. Collective."""
        needs = needs_of(active(self.method, step))
        teacher = self.teacher.score(rows, needs.topk) if self.teacher and needs.teacher else None
        reference = None
        if self.reference and needs.reference:
            reference = self.reference.score(rows).logprobs_T
        process = self.process.logprobs(rows) if self.process and needs.process else None
        return Signals(teacher, reference, process_logprobs_T=process)


@dataclass(frozen=True)
class Learner:
    """The models, objective and trainer of the student's updates, on this rank."""

    config: RunConfig  # with every k within the vocabulary
    needs: Needs
    judges: Judges
    objective: Objective
    trainer: Trainer
    # the self-teacher's weights, where they are of earlier steps
    copy: WeightCopy | None = None

    @property
    def student(self) -> Student:
        return self.trainer.student

    @property
    def trained(self) -> dict[str, Student | WeightCopy]:
        """The models of a checkpoint, by name."""
        models: dict[str, Student | WeightCopy] = {"model": self.student}
        if self.judges.process:
            models["process"] = self.judges.process.model
        if self.copy:
            models["teacher"] = self.copy
        return models

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The student's present weights under their Hugging Face names. Collective."""
        student = self.student
        return iter_hf_tensors(student.bare_chunks, student.arch, student.parallel)


def learn(
    learner: Learner, rows: list[Row], signals: Signals, step: int
) -> tuple[list[dict[str, float]], dict[str, float]]:
    """Makes the updates of a step, given the judges' signals of its rows. Collective.

    Returns the metrics of the updates, and those of the process model.
    """
    if learner.needs.student_pass:
        signals = replace(signals, student=learner.trainer.signals(rows))
    build = partial(_columns, learner.config, rows, signals, step)
    updates = learner.trainer.step(rows, build, step=step)
    if learner.copy:
        learner.copy.follow(step)
    metrics = _learn_rewards(learner, rows, signals, step)
    return [finish(sums) for sums in updates], metrics


def _learn_rewards(
    learner: Learner, rows: list[Row], signals: Signals, step: int
) -> dict[str, float]:
    """Updates the process model, whose earlier logprobs the student's update has used."""
    process = learner.judges.process
    if process is None or signals.process_logprobs_T is None:
        return {}
    batch = batch_of(learner.config, rows, signals, step)
    return process.learn(rows, process_columns(batch), step=step)


def _columns(
    config: RunConfig, rows: list[Row], signals: Signals, step: int, chosen: slice, tokens: slice
) -> Columns:
    """The columns of the rows `chosen` for one update, whose tokens are `tokens`."""
    batch = batch_of(config, rows[chosen], signals.part(tokens), step)
    return build_columns(config.method, batch)


def batch_of(config: RunConfig, rows: Sequence[Row], signals: Signals, step: int) -> Batch:
    """The rows and signals of an update, with the settings that terms read."""
    most = config.rollout.max_completion_tokens
    return Batch(rows, signals, config.seed, step, max_completion_tokens=most)
