"""The stations of a run, which a step walks through."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_opd.contracts.rows import Row
from megatron_opd.contracts.sampling import Draw
from megatron_opd.contracts.skills import Retriever
from megatron_opd.contracts.stations import Engine, Sampler, Verifier, WeightSender
from megatron_opd.evaluation.heldout import HeldOut
from megatron_opd.evaluation.suites import SuiteInRun
from megatron_opd.methods.needs import is_on_policy
from megatron_opd.methods.part import Needs
from megatron_opd.metrics.summary import Clock
from megatron_opd.recipe.keys import RunConfig
from megatron_opd.runs.collect import Notes, collect, off_policy
from megatron_opd.runs.learner import Learner
from megatron_opd.skills.pulls import pulls_of
from megatron_opd.tasks.source import TaskStream


@dataclass(frozen=True)
class Stations:
    """The stations of a run, on this rank."""

    learner: Learner
    source: TaskStream
    verifier: Verifier | None
    sampler: Sampler
    retriever: Retriever | None = None  # of the skills of an environment's episodes
    # The engine of a run that samples, and the sender of the student's weights to it.
    engine: Engine | None = None
    sender: WeightSender | None = None
    heldout: Sequence[HeldOut] = ()
    suites: Sequence[SuiteInRun] = ()
    # what answers the suites: the run's engine, which is started again where it fails
    single_turn: Sampler | None = None

    @property
    def config(self) -> RunConfig:
        return self.learner.config

    @property
    def needs(self) -> Needs:
        return self.learner.needs

    def rows(self, step: int, clock: Clock, notes: Notes) -> list[Row]:
        """The rows of a step, verified and the same on every rank. Collective."""
        settings = self.config.rollout
        method = self.config.method
        if not is_on_policy(method, self.config.seed, step):
            return off_policy(self.source.next(settings.num_prompts))
        draw = Draw(
            seed=self.config.seed,
            step=step,
            version=step,
            samples=settings.samples_per_prompt,
            max_tokens=settings.max_completion_tokens,
            temperature=settings.temperature,
            stop=tuple(settings.stop),
        )
        rows = collect(
            self.sampler,
            self.source,
            self.verifier,
            draw,
            clock,
            notes,
            num_groups=settings.num_prompts,
            group_size=settings.samples_per_prompt + method.traces_per_group,
            max_refills=method.max_refills,
        )
        if self.retriever:
            self.retriever.learn(pulls_of(rows))
        return rows
