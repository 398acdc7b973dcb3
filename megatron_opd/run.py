"""A run: its stations, assembled in the order in which they depend on each other, and its state between steps."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_opd.config.architecture import Architecture, architecture_of
from megatron_opd.config.load import dump_config
from megatron_opd.config.model_files import common_vocabulary, holds_megatron_weights
from megatron_opd.config.plan import Plan, active, fit_topk, plan, process_reward
from megatron_opd.config.schema import ModelConfig, RunConfig
from megatron_opd.errors import Interrupted
from megatron_opd.mcore import parallel as groups
from megatron_opd.mcore.model import build_model
from megatron_opd.mcore.parallel import Parallel
from megatron_opd.metrics.run_directory import write_atomically
from megatron_opd.metrics.sinks import Sinks
from megatron_opd.objective.loss import Objective
from megatron_opd.objective.process_reward import ProcessRewardObjective
from megatron_opd.prompts.data import load_heldout, load_training
from megatron_opd.prompts.source import PromptSource
from megatron_opd.prompts.tokenizer import load_tokenizer
from megatron_opd.records import Prompt, Rollout, Signals, StepRecord
from megatron_opd.refit.push import push
from megatron_opd.reward.pool import RewardPool
from megatron_opd.rollout.engine import RolloutEngine
from megatron_opd.teacher.score import Teacher
from megatron_opd.train import checkpoint
from megatron_opd.train.process_reward import ProcessModel, prepare_process_model
from megatron_opd.train.step import Trainer
from megatron_opd.train.student import Student, prepare
from megatron_opd.weights.export import export_hf, iter_hf_tensors
from megatron_opd.weights.load import load_hf


@dataclass
class Run:
    """Everything the loop works with, on this rank."""

    config: RunConfig
    plan: Plan
    directory: Path
    student: Student
    teacher: Teacher | None
    reference: Teacher | None  # the student as the run found it
    process: ProcessModel | None  # trained beside the student, for rewards of every token
    objective: Objective
    trainer: Trainer
    engine: RolloutEngine | None
    teacher_engine: RolloutEngine | None  # where the teacher draws some of the tokens
    rewards: RewardPool | None
    source: PromptSource
    heldout: list[Prompt]
    sinks: Sinks | None  # on rank 0
    stop: "StopRequest"
    resumed_at: int  # steps done when this process began
    step: int  # steps done; also the policy version of the weights
    carried: dict[str, float] = field(default_factory=dict)  # metrics of work after a step's record was written

    def evaluates_at(self, step: int) -> bool:
        settings = self.config.eval
        return settings is not None and (step == 0 or (settings.every > 0 and step % settings.every == 0))

    def signals(self, rollouts: list[Rollout], step: int) -> Signals:
        """What the models beside the student say of the rollouts, as far as a term with a weight at `step` reads it."""
        needs = plan(active(self.config.method, step))
        teacher = self.teacher.score(rollouts, needs.topk) if self.teacher and needs.teacher else None
        reference = self.reference.score(rollouts).logprobs_T if self.reference and needs.reference else None
        process = self.process.logprobs(rollouts) if self.process and needs.process else None
        return Signals(teacher, reference, process_logprobs_T=process)

    def refit(self, version: int) -> dict[str, float]:
        """The student's present weights into the engine. Collective."""
        assert self.engine is not None
        tensors = iter_hf_tensors(self.student.bare_chunks, self.student.arch, self.student.parallel)
        report = push(tensors, self.engine, version)
        return {"refit/bytes": report.bytes, "refit/max_error": report.max_error}

    def log(self, record: StepRecord) -> None:
        record.metrics |= self.carried
        self.carried = {}
        if self.sinks:
            self.sinks.log(record)

    def note(self, text: str) -> None:
        if self.sinks:
            self.sinks.note(text)

    def finish_step(self, step: int) -> None:
        """Saves when it is time or when asked to stop. Raises Interrupted in the latter case, on every rank."""
        self.step = step + 1
        settings, last = self.config.checkpoint, self.step == self.config.num_steps
        stopping = groups.any_rank(self.stop.asked, self.student.parallel.device)
        if last or stopping or (settings.every and self.step % settings.every == 0):
            state = {"source": self.source.state_dict(), "skipped_in_a_row": self.trainer.skipped_in_a_row}
            start = time.perf_counter()
            models = _trained(self.student, self.process)
            checkpoint.save(self.directory / "checkpoints", self.step, models, state, keep=settings.keep)
            self.carried["timing/checkpoint_seconds"] = time.perf_counter() - start
        if stopping and not last:
            raise Interrupted(
                f"stopped after step {step}; go on with: megatron-opd train {self.directory} --resume "
                f"--nproc {dist.get_world_size()}"
            )

    def export(self) -> None:
        """The student as a Hugging Face directory, `<run>/hf`; one of before a resume is kept as `hf-step-NNNNNN`."""
        out, known = self.directory / "hf", [False]
        if dist.get_rank() == 0 and out.exists():
            known = [self.step == self.resumed_at]
            if not known[0]:
                out.rename(self.directory / f"hf-step-{self.resumed_at:06d}")
        dist.broadcast_object_list(known, src=0)
        if not known[0]:
            export_hf(self.student.bare_chunks, self.student.arch, self.student.parallel, self.config.student.path, out)
            self.note(f"exported {out}, a Hugging Face directory")

    def report(self) -> None:
        """`report.html` and the plots, on rank 0."""
        if self.sinks:
            from megatron_opd.metrics.report import write_report  # matplotlib takes a second to import

            self.note(f"wrote {write_report(self.directory)}")


class StopRequest:
    """Ctrl-C and SIGTERM ask the loop to stop after the present step; a second one ends the process at once."""

    def __init__(self) -> None:
        self.asked = False
        self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}

    def _handle(self, number: int, frame: Any) -> None:
        if self.asked:
            os._exit(130)
        self.asked = True

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def open_run(config: RunConfig, *, resume: bool) -> Iterator[Run]:
    """Assembles the stations, hands out the run, and takes everything down again whatever happens."""
    with contextlib.ExitStack() as closing:
        groups.start()
        closing.callback(groups.stop)
        stop = StopRequest()
        closing.callback(stop.restore)
        run = _assemble(config, resume, stop, closing)
        yield run


def _assemble(config: RunConfig, resume: bool, stop: StopRequest, closing: contextlib.ExitStack) -> Run:
    recipe, needs = config, plan(config.method, config.train.updates_per_step)
    vocabularies = [architecture_of(each).vocab_size for each in (config.student, config.teacher) if each]
    config = replace(config, method=fit_topk(config.method, min(vocabularies)))
    directory = Path(config.directory)
    rewards = None
    if needs.rewards or config.eval:
        rewards = RewardPool(config.reward)
        closing.callback(rewards.close)
        rewards.warm_up()
    arch = architecture_of(config.student)
    layout = groups.create(config.student.layout)
    student = prepare(_load(config.student, arch, layout, config.precision), arch, layout, config)
    teacher = _frozen(config, config.teacher, arch) if needs.teacher or needs.teacher_head else None
    reference = _frozen(config, config.student, arch) if needs.reference else None
    temperature = config.rollout.temperature if needs.rollouts else 1.0
    process = _process(config, arch, layout, temperature)
    objective = Objective(config.method, arch.vocab_size, temperature)
    trainer = Trainer(
        student,
        objective,
        updates_per_step=config.train.updates_per_step,
        micro_size=config.train.micro_batch_size,
        temperature=temperature,
        max_skipped=config.train.max_skipped_updates,
        teacher_head=teacher.head if teacher and needs.teacher_head else None,
    )
    tokenizer = load_tokenizer(config.student.path)
    prompts = load_training(config, tokenizer, need_answer=needs.rewards, need_trace=needs.traces)
    source = PromptSource(prompts, seed=config.seed, shuffle=config.data.shuffle)
    heldout = load_heldout(config, tokenizer) if config.eval else []
    state, warnings = _resume_state(directory, _trained(student, process)) if resume else ({"step": 0}, [])
    if "source" in state:
        source.load_state_dict(state["source"])
        trainer.skipped_in_a_row = state["skipped_in_a_row"]
    engine = teacher_engine = None
    if needs.rollouts or config.eval:
        engine = _engine(config, config.student)
        closing.callback(engine.close)
    if config.method.teacher_share and config.teacher:
        teacher_engine = _engine(config, config.teacher, sleeps=False)
        closing.callback(teacher_engine.close, groups_too=False)
    sinks = _open_sinks(recipe, directory, tokenizer, state["step"] if resume else None, closing)
    run = Run(
        config, needs, directory, student, teacher, reference, process, objective, trainer, engine, teacher_engine,
        rewards, source, heldout, sinks, stop, resumed_at=state["step"], step=state["step"],
    )  # fmt: skip
    for line in warnings:
        run.note(line)
    if engine:
        # Not version 0 as vLLM read it from disk: what it gets after every update, through the same path.
        run.refit(run.step)
    return run


def _load(model: ModelConfig, arch: Architecture, layout: Parallel, precision: str) -> list[Any]:
    chunks = build_model(arch, layout, precision=precision)
    if holds_megatron_weights(Path(model.path)):
        checkpoint.load_converted(Path(model.path), chunks, arch, layout)
    else:
        load_hf(chunks, model.path, arch, layout)
    return chunks


def _engine(config: RunConfig, model: ModelConfig, *, sleeps: bool = True) -> RolloutEngine:
    return RolloutEngine(
        model,
        config.rollout,
        precision=config.precision,
        max_sequence_length=config.max_sequence_length,
        seed=config.seed,
        sleeps=sleeps,
    )


def _frozen(config: RunConfig, model: ModelConfig | None, student_arch: Architecture) -> Teacher:
    """A model that only scores: the teacher, or the student as it is on disk."""
    assert model is not None, "checked before the run"
    arch = architecture_of(model)
    layout = groups.create(model.layout)
    common = common_vocabulary(Path(config.student.path), Path(model.path))
    return Teacher(
        _load(model, arch, layout, config.precision),
        arch,
        layout,
        student_vocab_size=student_arch.vocab_size if common is None else common,
        micro_batch_size=config.train.micro_batch_size,
        temperature=config.rollout.temperature,
    )


def _process(config: RunConfig, arch: Architecture, layout: Parallel, temperature: float) -> ProcessModel | None:
    advantage = process_reward(config.method)
    if advantage is None:
        return None
    chunks = _load(config.student, arch, layout, config.precision)
    model = prepare_process_model(chunks, arch, layout, config, advantage)
    objective = ProcessRewardObjective(advantage.beta, arch.vocab_size, temperature)
    return ProcessModel(model, objective, config.train.micro_batch_size, temperature)


def _trained(student: Student, process: ProcessModel | None) -> dict[str, Student]:
    """What a checkpoint holds."""
    return {"model": student} | ({"process": process.model} if process else {})


def _resume_state(directory: Path, models: dict[str, Student]) -> tuple[dict[str, Any], list[str]]:
    """Loads the newest whole checkpoint; rank 0 decides which. A run stopped before its first one starts again."""
    choice: list[Any] = [None]
    if dist.get_rank() == 0:
        choice = [checkpoint.newest(directory / "checkpoints")]
    dist.broadcast_object_list(choice, src=0)
    path, warnings = choice[0]
    return ({"step": 0} if path is None else checkpoint.load(path, models)), warnings


def _open_sinks(
    config: RunConfig, directory: Path, tokenizer: Any, resume_step: int | None, closing: contextlib.ExitStack
) -> Sinks | None:
    """Rank 0 creates the run directory; the others learn whether that worked."""
    outcome: list[Any] = [None]
    sinks = None
    if dist.get_rank() == 0:
        try:
            sinks = Sinks(directory, config, tokenizer, resume_step)
            closing.callback(sinks.close)
            write_atomically(directory / "config.yaml", dump_config(config).encode())
        except Exception as error:
            outcome = [error]
    dist.broadcast_object_list(outcome, src=0)
    if outcome[0] is not None:
        raise outcome[0]
    return sinks
