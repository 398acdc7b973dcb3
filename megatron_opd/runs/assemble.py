"""The models of a run, built or loaded on this rank's layouts."""

from dataclasses import replace
from pathlib import Path

import torch

from megatron_opd.architectures.architecture import Architecture, architecture_of
from megatron_opd.architectures.config import ModelConfig
from megatron_opd.architectures.directory import common_vocabulary, holds_megatron_weights
from megatron_opd.architectures.ends import merged_ends
from megatron_opd.contracts.stations import Teacher
from megatron_opd.mcore import parallel as groups
from megatron_opd.mcore.model import build_model
from megatron_opd.mcore.parallel import Parallel
from megatron_opd.methods.needs import fit_topk, needs_of, process_reward
from megatron_opd.objective.loss import Objective
from megatron_opd.objective.process_reward import ProcessRewardObjective
from megatron_opd.recipe.keys import RunConfig, TeacherConfig
from megatron_opd.runs.learner import Judges, Learner
from megatron_opd.teacher.remote import RemoteTeacher
from megatron_opd.teacher.score import MegatronTeacher
from megatron_opd.trainer.checkpoint import load_converted
from megatron_opd.trainer.process_reward import ProcessModel, prepare_process_model
from megatron_opd.trainer.step import Trainer
from megatron_opd.trainer.student import prepare
from megatron_opd.weights.load import load_hf
from megatron_opd.world import processes


def assemble(config: RunConfig) -> Learner:
    """The recipe's models, loaded. Collective over the student's world, after `processes.start`."""
    needs = needs_of(config.method, config.train.updates_per_step)
    arch = architecture_of(config.student)
    shared = arch.vocab_size
    if config.teacher:
        shared = shared_vocabulary(config.student, config.teacher)
    config = replace(config, method=fit_topk(config.method, shared))
    layout = groups.create(config.student.layout)
    student = prepare(load(config, config.student, arch, layout), arch, layout, config)
    channel = processes.channel("teacher")
    teacher: Teacher | None = None
    if needs.teacher or needs.teacher_head:
        teacher = RemoteTeacher(channel, config) if channel else load_teacher(config)
    reference = _frozen(config, config.student) if needs.reference else None
    temperature = config.rollout.temperature if needs.rollouts else 1.0
    process = _process(config, arch, layout, temperature)
    objective = Objective(config.method, arch.vocab_size, temperature, shared)
    teacher_head = None
    if isinstance(teacher, MegatronTeacher) and needs.teacher_head:
        teacher_head = teacher.head
    trainer = Trainer(
        student,
        objective,
        updates_per_step=config.train.updates_per_step,
        micro_batch_tokens=config.train.micro_batch_tokens,
        temperature=temperature,
        max_skipped=config.train.max_skipped_updates,
        teacher_head=teacher_head,
    )
    judges = Judges(config.method, teacher, reference, process)
    return Learner(config, needs, judges, objective, trainer)


def load_teacher(config: RunConfig) -> MegatronTeacher:
    """The recipe's teacher, on the processes of this world."""
    return _frozen(config, config.teacher)


def shared_vocabulary(student: ModelConfig, teacher: ModelConfig) -> int:
    """The number of first ids that are tokens of both models.

    Ids of one model alone, tokens or padding, lie behind them.
    """
    smaller = min(architecture_of(model).vocab_size for model in (student, teacher))
    common = common_vocabulary(Path(student.path), Path(teacher.path))
    return smaller if common is None else min(smaller, common)


def load(
    config: RunConfig, model: ModelConfig, arch: Architecture, layout: Parallel
) -> list[torch.nn.Module]:
    """This rank's chunks of a model directory, in the recipe's precision."""
    chunks = build_model(
        arch, layout, precision=config.precision, recompute=config.train.recompute_granularity
    )
    if holds_megatron_weights(Path(model.path)):
        load_converted(Path(model.path), chunks, arch, layout)
    else:
        load_hf(chunks, model.path, arch, layout)
    return chunks


def _frozen(config: RunConfig, model: ModelConfig | None) -> MegatronTeacher:
    """A model that only scores: the teacher, or the student as it is on disk."""
    assert model is not None, "checked before the run"
    arch = architecture_of(model)
    layout = groups.create(model.layout)
    return MegatronTeacher(
        load(config, model, arch, layout),
        arch,
        layout,
        student_vocab_size=shared_vocabulary(config.student, model),
        micro_batch_tokens=config.train.micro_batch_tokens,
        temperature=config.rollout.temperature,
        merged=merged_ends(config.student.path, model.path),
        offload=isinstance(model, TeacherConfig) and model.offload,
    )


def _process(
    config: RunConfig, arch: Architecture, layout: Parallel, temperature: float
) -> ProcessModel | None:
    advantage = process_reward(config.method)
    if advantage is None:
        return None
    chunks = load(config, config.student, arch, layout)
    model = prepare_process_model(chunks, arch, layout, config, advantage)
    objective = ProcessRewardObjective(advantage.beta, arch.vocab_size, temperature)
    return ProcessModel(model, objective, config.train.micro_batch_tokens, temperature)
