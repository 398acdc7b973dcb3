"""A run: its stations, assembled in the order in which they depend on each other, and its state
between steps."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_opd.architectures.ends import merged_ends, read_ends
from megatron_opd.contracts.merged_ids import MergedIds
from megatron_opd.contracts.rows import StepRecord, Task
from megatron_opd.contracts.stations import Engine, Verifier
from megatron_opd.errors import Interrupted, OutOfTime, RunError
from megatron_opd.methods.needs import needs_of
from megatron_opd.metrics.run_directory import disk_may_be_full
from megatron_opd.metrics.sinks import Sinks
from megatron_opd.recipe.keys import RunConfig
from megatron_opd.refit.push import push
from megatron_opd.rollout.open import open_engine, start_vllm_engine
from megatron_opd.runs import exported, resumed
from megatron_opd.runs.assemble import Models, assemble
from megatron_opd.tasks.data import load_heldout, load_training
from megatron_opd.tasks.pin import pin
from megatron_opd.tasks.source import TaskSource
from megatron_opd.tasks.tokenizer import load_tokenizer
from megatron_opd.trainer import checkpoint
from megatron_opd.verify.open import open_verifier
from megatron_opd.weights.export import export_hf, iter_hf_tensors
from megatron_opd.world import processes


@dataclass
class Run(Models):
    """Everything the loop works with, on this rank. Its `config` is the recipe with every k within
    the vocabulary."""

    directory: Path
    engine: Engine | None
    teacher_engine: Engine | None  # where the teacher draws some of the tokens
    rewards: Verifier | None
    source: TaskSource
    heldout: list[Task]
    sinks: Sinks | None  # on rank 0
    stop: "StopRequest"
    step: int  # steps done; also the policy version of the weights
    # metrics of work after a step's record was written
    carried: dict[str, float] = field(default_factory=dict)

    @property
    def merged_ends(self) -> MergedIds | None:
        """Ends that the teacher has and the student lacks."""
        teacher = self.config.teacher
        return merged_ends(self.config.student.path, teacher.path) if teacher else None

    def evaluates_at(self, step: int) -> bool:
        settings = self.config.eval
        return settings is not None and (
            step == 0 or (settings.every > 0 and step % settings.every == 0)
        )

    def refit(self, version: int) -> dict[str, float]:
        """The student's present weights into the engine. Collective."""
        assert self.engine is not None
        tensors = iter_hf_tensors(
            self.student.bare_chunks, self.student.arch, self.student.parallel
        )
        report = push(tensors, self.engine, version)
        return {"refit/bytes": report.bytes, "refit/max_error": report.max_error}

    def rest_engine(self) -> None:
        """The device's memory is for the models now, also in a step that sampled nothing after the
        last refit."""
        if self.engine:
            self.engine.sleep()

    def sampled[T](self, work: Callable[[], T]) -> T:
        """The result of `work`, which samples with the engines. Collective.

        Where an engine fails in it, all are started again, once, with the student's present
        weights, and all ranks do the work anew. With a second engine, for the teacher's tokens, the
        failure ends the run.
        """
        failure = None
        try:
            result = work()
        except RunError as error:
            failure = error
        if not processes.any_rank(failure is not None, self.student.parallel.device):
            return result
        if self.engine is None or self.teacher_engine:
            raise failure or RunError("the engine of another rank failed")
        self.note(
            f"step {self.step}: {failure or 'the engine of another rank failed'}; starting the "
            "engines again"
        )
        # its traceback holds the engine that failed, whose memory the next one needs
        failure = None
        self.engine.restart()
        self.carried["rollout/engine_restarts"] = self.carried.get("rollout/engine_restarts", 0) + 1
        self.refit(self.step)
        return work()

    def log(self, record: StepRecord) -> None:
        record.metrics |= self.carried
        self.carried = {}
        if self.sinks:
            self.sinks.log(record)

    def note(self, text: str) -> None:
        if self.sinks:
            self.sinks.note(text)

    def finish_step(self, step: int) -> None:
        """Saves when it is time or when asked to stop. Then raises Interrupted or OutOfTime, on
        every rank."""
        self.step = step + 1
        settings, last = self.config.checkpoint, self.step == self.config.num_steps
        stopping = processes.any_rank(self.stop.asked, self.student.parallel.device)
        if last or stopping or (settings.every and self.step % settings.every == 0):
            state = {
                "source": self.source.state_dict(),
                "skipped_in_a_row": self.trainer.skipped_in_a_row,
                "num_steps": self.config.num_steps,
            }
            start = time.perf_counter()
            if self.sinks:
                self.sinks.sync()
            checkpoint.save(
                self.directory / "checkpoints", self.step, self.trained, state, keep=settings.keep
            )
            self.carried["timing/checkpoint_seconds"] = time.perf_counter() - start
        if stopping and not last:
            if processes.any_rank(self.stop.out_of_time, self.student.parallel.device):
                raise OutOfTime(f"saved after step {step}, before the time limit")
            raise Interrupted(
                f"stopped after step {step}; go on with: megatron-opd train {self.directory} "
                f"--resume --nproc {os.environ.get('WORLD_SIZE', '1')}"
            )

    def export(self) -> None:
        """The student as a Hugging Face directory, `<run>/hf`, unless it is there. Collective,
        after the last save."""
        origin = processes.from_rank_0(lambda: exported.due(self.directory, self.step))
        if origin:
            student, source, out = self.student, self.config.student.path, self.directory / "hf"
            export_hf(
                student.bare_chunks, student.arch, student.parallel, source, out, origin=origin
            )
            self.note(f"exported {out}, a Hugging Face directory")

    def report(self) -> None:
        """`report.html` and the plots, on rank 0."""
        if self.sinks:
            from megatron_opd.report.page import write_report  # matplotlib takes a second to import

            self.note(f"wrote {write_report(self.directory)}")


class StopRequest:
    """Ctrl-C and SIGTERM ask the loop to stop after the present step; a second one ends the process
    at once.

    SIGUSR1 asks for the same: it is what Slurm sends ahead of a time limit.
    """

    def __init__(self) -> None:
        self.asked = self.out_of_time = False
        self._before = {
            s: signal.signal(s, self._handle)
            for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        }

    def _handle(self, number: int, frame: Any) -> None:
        if number == signal.SIGUSR1:
            self.out_of_time = True
        elif self.asked:
            os._exit(130)
        self.asked = True

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def open_run(config: RunConfig, *, resume: bool) -> Iterator[Run]:
    """Assembles the stations, hands out the run, and takes everything down again whatever
    happens."""
    with disk_may_be_full(Path(config.directory)), contextlib.ExitStack() as closing:
        stop = StopRequest()
        closing.callback(stop.restore)
        run = _assemble(config, resume, stop, closing)
        yield run


def _assemble(
    config: RunConfig, resume: bool, stop: StopRequest, closing: contextlib.ExitStack
) -> Run:
    config = processes.from_rank_0(lambda: pin(config))  # its clock, its data files
    needs = needs_of(config.method, config.train.updates_per_step)
    directory = Path(config.directory)
    rewards = None
    if needs.rewards or config.eval:
        rewards = open_verifier(config.reward, closing)
    models = assemble(config)
    tokenizer = load_tokenizer(config.student.path)
    tasks = load_training(
        config, tokenizer, need_answer=needs.rewards, need_trace=needs.traces, warn=_warned_before
    )
    source = TaskSource(tasks, seed=config.seed, shuffle=config.data.shuffle)
    heldout = load_heldout(config, tokenizer, warn=_warned_before) if config.eval else []
    state, warnings = resumed.load_newest(config, models.trained) if resume else ({"step": 0}, [])
    if "source" in state:
        source.load_state_dict(state["source"])
        models.trainer.skipped_in_a_row = state["skipped_in_a_row"]
    engine: Engine | None = None
    teacher_engine: Engine | None = None
    if needs.rollouts or config.eval:
        # the refit below brings the trainer's weights
        engine = open_engine(config, processes.channel("rollout"), closing)
    if config.method.teacher_share and config.teacher:
        ends = read_ends(config.student.path)
        second = start_vllm_engine(config, config.teacher, sleeps=False, further_ends=ends.ids)
        closing.callback(second.close, groups_too=False)
        teacher_engine = second
    sinks = _open_sinks(config, directory, tokenizer, state["step"] if resume else None, closing)
    run = Run(
        **vars(models),
        directory=directory,
        engine=engine,
        teacher_engine=teacher_engine,
        rewards=rewards,
        source=source,
        heldout=heldout,
        sinks=sinks,
        stop=stop,
        step=state["step"],
    )
    for line in warnings:
        run.note(line)
    if engine:
        run.refit(run.step)
    return run


def _warned_before(text: str) -> None:
    """`check_data` has read the same files and passed the warning on."""


def _open_sinks(
    config: RunConfig,
    directory: Path,
    tokenizer: Any,
    resume_step: int | None,
    closing: contextlib.ExitStack,
) -> Sinks | None:
    """Rank 0 creates the run directory; the others learn whether that worked."""
    sinks = None

    def open_files() -> None:
        nonlocal sinks
        sinks = Sinks(directory, config, tokenizer, resume_step)
        closing.callback(sinks.close)

    processes.from_rank_0(open_files)
    return sinks
