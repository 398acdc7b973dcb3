"""A run: its stations, assembled in the order of their dependence, its book, and its progress."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_opd.contracts.rows import Task
from megatron_opd.contracts.stations import Engine, Sampler, Tokenizer, WeightSender
from megatron_opd.errors import Interrupted, OutOfTime
from megatron_opd.evaluation.agents import Agents, open_agents
from megatron_opd.evaluation.heldout import HeldOut
from megatron_opd.evaluation.sampler import heldout_tasks
from megatron_opd.evaluation.suites import open_in_run
from megatron_opd.methods.needs import needs_of
from megatron_opd.methods.part import Needs
from megatron_opd.metrics.run_directory import disk_may_be_full
from megatron_opd.recipe.keys import RunConfig
from megatron_opd.refit.push import Refit
from megatron_opd.rollout.open import open_engine, open_sampler, open_teacher_engine
from megatron_opd.rollout.restart import Restart, Restarting
from megatron_opd.rollout.single_turn import SingleTurn
from megatron_opd.rollout.traces import Traces
from megatron_opd.runs.assemble import assemble
from megatron_opd.runs.book import Book
from megatron_opd.runs.resumed import State, load_newest
from megatron_opd.runs.stations import Stations
from megatron_opd.tasks.data import load_training
from megatron_opd.tasks.pin import pin
from megatron_opd.tasks.source import Mixture, TaskSource, TaskStream
from megatron_opd.tasks.tokenizer import load_tokenizer
from megatron_opd.verify.open import open_verifier
from megatron_opd.world import processes
from megatron_opd.world.stop import StopRequest


@dataclass
class Run:
    """A run on this rank, for the loop."""

    stations: Stations
    book: Book
    stop: StopRequest
    step: int  # steps done; also the policy version of the weights

    def finish_step(self) -> None:
        """Counts the step, and saves when a checkpoint is due or a stop is asked for. Collective.

        A stop then raises Interrupted or OutOfTime, on every rank.
        """
        config = self.stations.config
        self.step += 1
        every = config.checkpoint.every
        last = self.step == config.num_steps
        stopping = processes.any_rank(self.stop.asked)
        if last or stopping or (every and self.step % every == 0):
            self.book.save(self._state(), self.stations.learner.trained)
        if stopping and not last:
            if processes.any_rank(self.stop.out_of_time):
                raise OutOfTime(f"saved after step {self.step - 1}, before the time limit")
            raise Interrupted(
                f"stopped after step {self.step - 1}; go on with: megatron-opd train "
                f"{self.book.directory} --resume --nproc {os.environ.get('WORLD_SIZE', '1')}"
            )

    def _state(self) -> State:
        at = self.stations
        skipped = at.learner.trainer.skipped_in_a_row
        retrieved = at.retriever.state_dict() if at.retriever else {}
        return State(self.step, at.source.state_dict(), skipped, at.config.num_steps, retrieved)


@contextlib.contextmanager
def open_run(config: RunConfig, *, resume: bool) -> Iterator[Run]:
    """Assembles a run, and takes it down at the end of the block, in any case."""
    with disk_may_be_full(Path(config.directory)), contextlib.ExitStack() as closing:
        stop = StopRequest()
        closing.callback(stop.restore)
        yield _assemble(config, resume, stop, closing)


def _assemble(
    config: RunConfig, resume: bool, stop: StopRequest, closing: contextlib.ExitStack
) -> Run:
    config = processes.from_rank_0(lambda: pin(config))  # clock and data files of rank 0
    needs = needs_of(config.method, config.train.updates_per_step)
    judged = (needs.rewards or config.eval) and config.environment is None
    verifier = open_verifier(config, closing) if judged else None
    tokenizer: Tokenizer = load_tokenizer(config.student.path)
    agents = open_agents(config, tokenizer, closing)
    learner = assemble(config)
    source, heldout = _tasks(config, needs, tokenizer, agents)
    state = None
    warnings: list[str] = []
    if resume:
        state, warnings = load_newest(config, learner.trained)
    if state:
        source.load_state_dict(state.source)
        learner.trainer.skipped_in_a_row = state.skipped_in_a_row
    step = state.step if state else 0
    engine = teacher_engine = None
    if needs.rollouts or config.eval:
        # The refit below brings the trainer's weights.
        engine = open_engine(config, processes.channel("rollout"), closing)
        teacher_engine = open_teacher_engine(config, closing)
    book = Book(config, tokenizer, step if resume else None, closing)
    for line in warnings:
        book.note(line)
    retriever = agents.retriever if agents else None
    if retriever and state:
        retriever.load_state_dict(state.retriever)
    stations = Stations(learner, source, verifier, Traces(), retriever)
    if engine:
        sender = Refit(learner.tensors, engine)
        sender.send(step)
        stations = replace(stations, engine=engine, sender=sender)
        # If a second engine draws the teacher's tokens, a failure ends the run.
        restart = None if teacher_engine else _restart_of(engine, sender, book)
        if needs.rollouts:
            if agents:
                sampler = agents.sampler(engine, "recipe")
            else:
                sampler = open_sampler(config, engine, teacher_engine, tokenizer)
            stations = replace(stations, sampler=Restarting(sampler, restart))
        if config.eval:
            stations = _evaluating(stations, agents, heldout, tokenizer, restart, closing)
    return Run(stations, book, stop, step)


def _evaluating(
    stations: Stations,
    agents: Agents | None,
    heldout: dict[str, list[Task]],
    tokenizer: Tokenizer,
    restart: Restart | None,
    closing: contextlib.ExitStack,
) -> Stations:
    """The stations with what the recipe's evaluations need."""
    config = stations.config
    engine = stations.engine
    assert engine is not None and config.eval is not None, "the caller has opened it"
    single_turn = Restarting(SingleTurn(engine, tokenizer), restart)
    suites = open_in_run(config, tokenizer, closing)
    stations = replace(stations, suites=suites, single_turn=single_turn)
    if not heldout:
        return stations
    answering: dict[str, Sampler] = {"": single_turn}
    if agents:
        answering = {}
        for prefix, sampler in agents.evaluating(engine, config.eval).items():
            answering[prefix] = Restarting(sampler, restart)
    sets = []
    for name, tasks in heldout.items():
        settings = config.evaluation_of(name)
        sets.append(HeldOut(answering, stations.verifier, tasks, config, settings, name))
    return replace(stations, heldout=sets)


def _tasks(
    config: RunConfig, needs: Needs, tokenizer: Tokenizer, agents: Agents | None
) -> tuple[TaskStream, dict[str, list[Task]]]:
    """The source of the training tasks, and the held-out sets if there is an evaluation."""

    def warned_before(text: str) -> None:
        """Drops a warning: `check_data` has read the same files and passed it on."""

    seed = config.seed
    shuffle = config.data.shuffle
    source: TaskStream
    if agents:
        tasks = processes.from_rank_0(lambda: agents.tasks("train"))
        source = TaskSource(tasks, seed=seed, shuffle=shuffle)
    else:
        parts = load_training(
            config,
            tokenizer,
            need_answer=needs.rewards,
            need_trace=needs.traces,
            warn=warned_before,
        )
        curriculum = config.data.curriculum
        ascending = curriculum.epochs if curriculum else 0
        if weights := {name: part.weight for name, part in config.data.parts.items()}:
            source = Mixture(parts, weights, seed=seed, shuffle=shuffle, ascending=ascending)
        else:
            source = TaskSource(parts[""], seed=seed, shuffle=shuffle, ascending=ascending)
    if not config.eval:
        return source, {}
    if agents:
        heldout = processes.from_rank_0(lambda: heldout_tasks(config, tokenizer, agents))
    else:
        heldout = heldout_tasks(config, tokenizer, None, warned_before)
    return source, heldout


def _restart_of(engine: Engine, sender: WeightSender, book: Book) -> Restart:
    """A function that starts the engines again, with the student's present weights."""

    def restart(version: int, reason: str) -> None:
        book.note(f"step {version}: {reason}; starting the engines again")
        engine.restart()
        book.count("rollout/engine_restarts", 1)
        sender.send(version)

    return restart
