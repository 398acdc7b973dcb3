"""The recipe's models, built or loaded on this rank's layouts."""

from pathlib import Path

import torch

from megatron_opd.architectures.architecture import Architecture, architecture_of
from megatron_opd.architectures.config import ModelConfig
from megatron_opd.architectures.directory import common_vocabulary, holds_megatron_weights
from megatron_opd.architectures.ends import merged_ends
from megatron_opd.mcore import parallel as groups
from megatron_opd.mcore.model import build_model
from megatron_opd.mcore.parallel import Parallel
from megatron_opd.recipe.keys import RunConfig, TeacherConfig
from megatron_opd.teacher.score import MegatronTeacher
from megatron_opd.trainer.checkpoint import load_converted
from megatron_opd.weights.load import load_hf


def load_teacher(config: RunConfig) -> MegatronTeacher:
    """The recipe's teacher, on the processes of this world."""
    return frozen(config, config.teacher)


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


def frozen(config: RunConfig, model: ModelConfig | None) -> MegatronTeacher:
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
