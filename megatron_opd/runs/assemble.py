"""The learner of a run: its models, put together on this rank's layouts."""

from dataclasses import replace

from megatron_opd.architectures.architecture import Architecture, architecture_of
from megatron_opd.mcore import parallel as groups
from megatron_opd.mcore.parallel import Parallel
from megatron_opd.methods.needs import fit_topk, needs_of, process_reward
from megatron_opd.objective.loss import Objective
from megatron_opd.objective.process_reward import ProcessRewardObjective
from megatron_opd.recipe.keys import RunConfig
from megatron_opd.runs.guides import open_guide
from megatron_opd.runs.learner import Judges, Learner
from megatron_opd.runs.models import frozen, load, shared_vocabulary
from megatron_opd.trainer.process_reward import ProcessModel, prepare_process_model
from megatron_opd.trainer.step import Trainer
from megatron_opd.trainer.student import prepare


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
    reference = frozen(config, config.student) if needs.reference else None
    guide = open_guide(config, needs, student, reference)
    temperature = config.rollout.temperature if needs.rollouts else 1.0
    process = _process(config, arch, layout, temperature)
    objective = Objective(config.method, arch.vocab_size, temperature, shared)
    trainer = Trainer(
        student,
        objective,
        updates_per_step=config.train.updates_per_step,
        micro_batch_tokens=config.train.micro_batch_tokens,
        temperature=temperature,
        max_skipped=config.train.max_skipped_updates,
        teacher_head=guide.head,
    )
    judges = Judges(config.method, guide.teacher, reference, process)
    return Learner(config, needs, judges, objective, trainer, guide.copy)


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
