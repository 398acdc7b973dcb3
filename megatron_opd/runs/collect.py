"""The rows of a step: sampled, verified, and the same on every rank."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megatron_opd.contracts.rows import VERIFIER_FAILURES, Row, Task, episodes_of, with_episodes
from megatron_opd.errors import RunError
from megatron_opd.methods.needs import is_on_policy
from megatron_opd.metrics.summary import Clock
from megatron_opd.rollout.mixture import generate_mixture
from megatron_opd.rollout.prefix import PrefixLaw
from megatron_opd.runs.run import Run
from megatron_opd.world.processes import gather_shares, share

# Shares of a step's answers above which failures of the verifier are warned of and end the run.
WARNED_SHARE = 0.05
LARGEST_SHARE = 0.5


def collect(run: Run, step: int, clock: Clock) -> list[Row]:
    """`num_prompts` groups, in order of group and sample. Collective.

    With `max_refills`, groups whose rewards are all equal are replaced with those of further
    tasks, as often as that; then equal ones fill up what is missing (DAPO's dynamic sampling,
    arXiv 2503.14476, Eq. 11).
    """
    if not is_on_policy(run.config.method, run.config.seed, step):
        # Every term of such a method is of the text at hand, whoever wrote it.
        return [
            trace.as_if_sampled()
            for trace in traces(run.source.next(run.config.rollout.num_prompts))
        ]
    wanted = run.config.rollout.num_prompts
    kept: list[list[Row]] = []
    uniform: list[list[Row]] = []
    drawn: Counter[int] = Counter()
    for _ in range(1 + run.config.method.max_refills):
        tasks = with_new_samples(run.source.next(wanted - len(kept)), drawn, _group_size(run))
        found = _groups(_scored(run, tasks, step, clock))
        if not run.config.method.max_refills:
            kept = found
            break
        kept += [group for group in found if not _all_equal(group)]
        uniform += [group for group in found if _all_equal(group)]
        if len(kept) == wanted:
            break
    groups = (kept + uniform)[:wanted]
    return [row for number, group in enumerate(groups) for row in _numbered(group, number)]


def _group_size(run: Run) -> int:
    return run.config.rollout.samples_per_prompt + run.config.method.traces_per_group


def with_new_samples(tasks: list[Task], drawn: Counter[int], group_size: int) -> list[Task]:
    """The tasks, those again that the step has `drawn` before: on few prompts, or where a refill
    begins an epoch."""
    fresh = []
    for task in tasks:
        fresh.append(replace(task, first_sample=drawn[task.index] * group_size))
        drawn[task.index] += 1
    return fresh


def _scored(run: Run, tasks: list[Task], step: int, clock: Clock) -> list[Row]:
    with clock("generate"):
        rows = (
            run.sampled(lambda: sample(run, tasks, step)) if run.needs.rollouts else traces(tasks)
        )
    with clock("reward"):
        # A method that reads no rewards runs on tasks without gold answers too; there is nothing
        # to score then.
        if run.rewards and (run.needs.rewards or any(task.answer for task in tasks)):
            rows = run.rewards.score(rows)
    with clock("gather"):
        if run.needs.rollouts:
            rows = sorted(gather_shares(rows), key=lambda r: (r.group, r.sample, r.turn))
    rows, failed = without_failed(rows)
    if failed:
        count = run.carried.get("rollout/failed_episodes", 0)
        run.carried["rollout/failed_episodes"] = count + failed
    if warning := check_verdicts(rows, step):
        run.note(warning)
    return rows


def without_failed(rows: Sequence[Row]) -> tuple[list[Row], int]:
    """The rows that count, and how many episodes do not: an environment that broke says nothing of
    the policy."""
    whole = [row for row in rows if row.episode.ended != "failed"]
    return whole, len(episodes_of(rows)) - len(episodes_of(whole))


def check_verdicts(rows: Sequence[Row], step: int) -> str | None:
    """A warning where the verifier fails on many answers, for which nothing is learned.

    Raises RunError where it fails on most of them. Answers that take too long do not count: a model
    may write them.
    """
    reasons = [episode.verdict.reason for episode in episodes_of(rows)]
    failures = Counter(reason for reason in reasons if reason in VERIFIER_FAILURES)
    count = sum(failures.values())
    if count <= WARNED_SHARE * len(reasons):
        return None
    listed = ", ".join(f"{number} {reason}" for reason, number in failures.most_common())
    text = f"step {step}: {count} of {len(reasons)} answers could not be judged ({listed})"
    if count > LARGEST_SHARE * len(reasons):
        raise RunError(f"{text}; mend the gold answers of data.train, or what ends the verifier")
    return f"warning: {text}; they count as wrong"


def _groups(rows: Sequence[Row]) -> list[list[Row]]:
    by_number: dict[int, list[Row]] = {}
    for row in rows:
        by_number.setdefault(row.group, []).append(row)
    return [by_number[number] for number in sorted(by_number)]


def _all_equal(group: Sequence[Row]) -> bool:
    """Whether its episodes have one reward: then none is better than another."""
    return len({episode.reward for episode in episodes_of(group)}) == 1


def _numbered(rows: Sequence[Row], group: int) -> list[Row]:
    """The rows of one group with its number."""
    return with_episodes(rows, lambda episode: replace(episode, group=group))


def sample(run: Run, tasks: list[Task], step: int) -> list[Row]:
    """Collective: a group for each task of this rank's share, completions and the traces that the
    method mixes in."""
    assert run.engine is not None, "a method that samples has an engine"
    settings, method, seed = run.config.rollout, run.config.method, run.config.seed
    asked: dict[str, Any] = {
        "version": step,
        "step": step,
        "samples_per_prompt": settings.samples_per_prompt,
        "max_completion_tokens": settings.max_completion_tokens,
        "temperature": settings.temperature,
        "seed": seed,
    }
    if method.teacher_share:
        assert run.teacher_engine is not None, "a method whose teacher draws has its engine"
        engines = (run.engine, run.teacher_engine)
        asked |= {"teacher_share": method.teacher_share, "merged": run.merged_ends}
        mine = generate_mixture(*engines, share(tasks), **asked)
    else:
        prefix_of = PrefixLaw(method.prefix, settings, step, seed) if method.prefix else None
        mine = run.engine.generate(share(tasks), prefix_of=prefix_of, **asked)
    group_of, size = share(list(range(len(tasks)))), settings.samples_per_prompt
    sampled = [
        row
        for group, first in zip(group_of, range(0, len(mine), size), strict=True)
        for row in _numbered(mine[first : first + size], group)
    ]
    return sampled + [
        Row.of_trace(task, group, task.first_sample + settings.samples_per_prompt + i)
        for task, group in zip(share(tasks), group_of, strict=True)
        for i in range(method.traces_per_group)
    ]


def traces(tasks: list[Task]) -> list[Row]:
    """The data set's own completions in the place of sampled ones."""
    return [Row.of_trace(task, group) for group, task in enumerate(tasks)]
