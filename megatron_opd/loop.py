"""The algorithm, on one screen: sample, verify, ask the teacher, update, hand the new weights to the sampler."""

from dataclasses import replace
from functools import partial

from megatron_opd.config.schema import RunConfig
from megatron_opd.evaluate import held_out
from megatron_opd.mcore.batch import Columns
from megatron_opd.mcore.parallel import gather_shares, share
from megatron_opd.metrics.summary import Clock, summarise
from megatron_opd.objective.batch import Batch
from megatron_opd.objective.columns import build_columns
from megatron_opd.objective.loss import finish
from megatron_opd.records import Prompt, Rollout, Signals, StepRecord
from megatron_opd.rollout.prefix import prefix_law
from megatron_opd.run import Run, open_run


def train(config: RunConfig, *, resume: bool) -> None:
    """Runs a recipe to its end; every rank of the world calls this.

    Raises Interrupted after Ctrl-C or SIGTERM, once the step is finished and saved.
    """
    with open_run(config, resume=resume) as run:
        for step in range(run.step, config.num_steps):
            record = one_step(run, step)
            run.log(record)
            run.finish_step(step)
        run.log(StepRecord(config.num_steps, held_out(run, config.num_steps)))
        run.export()
        run.report()


def one_step(run: Run, step: int) -> StepRecord:
    metrics = held_out(run, step) if run.evaluates_at(step) else {}
    clock = Clock()
    prompts = run.source.next(run.config.rollout.num_prompts)
    with clock("generate"):
        rollouts = sample(run, prompts, step) if run.plan.rollouts else traces(prompts)
    with clock("reward"):
        rollouts = run.rewards.score(rollouts) if run.rewards else rollouts
    with clock("gather"):
        if run.plan.rollouts:
            rollouts = sorted(gather_shares(rollouts), key=lambda r: (r.group, r.sample))
    with clock("teacher"):
        signals = run.frozen_signals(rollouts, step)
    with clock("train"):
        signals = replace(signals, student=run.trainer.signals(rollouts) if run.plan.student_pass else None)
        updates = run.trainer.step(rollouts, partial(columns, run, rollouts, signals, step), step=step)
    with clock("refit"):
        if run.plan.rollouts:
            metrics |= run.refit(step + 1)
    weights = run.objective.weights(step)
    metrics |= summarise([finish(sums) for sums in updates], rollouts, signals.teacher, weights) | clock.metrics()
    return StepRecord(step, metrics, rollouts, signals.teacher)


def sample(run: Run, prompts: list[Prompt], step: int) -> list[Rollout]:
    """A group for each prompt of this rank's share: completions, and traces where the method mixes them in."""
    assert run.engine is not None, "a method that samples has an engine"
    settings, method = run.config.rollout, run.config.method
    mine = run.engine.generate(
        share(prompts),
        version=step,
        step=step,
        samples_per_prompt=settings.samples_per_prompt,
        max_completion_tokens=settings.max_completion_tokens,
        temperature=settings.temperature,
        seed=run.config.seed,
        prefix_of=prefix_law(method.prefix, settings, step, run.config.seed) if method.prefix else None,
    )
    group_of = share(list(range(len(prompts))))
    sampled = [replace(r, group=group_of[i // settings.samples_per_prompt]) for i, r in enumerate(mine)]
    return sampled + [
        Rollout.of_trace(prompt, group, settings.samples_per_prompt + i)
        for prompt, group in zip(share(prompts), group_of, strict=True)
        for i in range(method.traces_per_group)
    ]


def traces(prompts: list[Prompt]) -> list[Rollout]:
    """The data set's own responses in the place of rollouts."""
    return [Rollout.of_trace(prompt, group) for group, prompt in enumerate(prompts)]


def columns(run: Run, rollouts: list[Rollout], signals: Signals, step: int, mine: slice, tokens: slice) -> Columns:
    """What the terms read, of the part of the rollouts that makes one update."""
    batch = Batch(rollouts[mine], signals.part(tokens), run.config.seed, step)
    return build_columns(run.config.method, batch, max_completion_tokens=run.config.rollout.max_completion_tokens)
