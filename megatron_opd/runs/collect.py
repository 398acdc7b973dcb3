"""The rows of a step: sampled, verified, and the same on every rank."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from megatron_opd.contracts.rows import (
    VERIFIER_FAILURES,
    Episode,
    Row,
    Task,
    episodes_of,
    with_episodes,
    without_columns,
)
from megatron_opd.contracts.sampling import Draw
from megatron_opd.contracts.stations import Sampler, Verifier
from megatron_opd.errors import RunError
from megatron_opd.metrics.summary import Clock
from megatron_opd.tasks.source import TaskStream
from megatron_opd.world.processes import gather_shares, share

# Fractions of a step's answers above which failures of the verifier are warned of, and end the run.
WARNED_SHARE = 0.05
LARGEST_SHARE = 0.5


class Notes(Protocol):
    """Lines and counts of a step beside its rows."""

    def note(self, text: str) -> None:
        """A line for the user."""

    def count(self, name: str, number: int) -> None:
        """Adds to a metric of the step."""


def collect(
    sampler: Sampler,
    source: TaskStream,
    verifier: Verifier | None,
    draw: Draw,
    clock: Clock,
    notes: Notes,
    *,
    num_groups: int,
    group_size: int,
    max_refills: int,
) -> list[Row]:
    """The rows of `num_groups` groups of at most `group_size` episodes, by group and sample.

    Groups whose rewards are all equal are replaced by groups of further tasks, up to `max_refills`
    times; then equal ones fill up the step (DAPO's dynamic sampling, arXiv 2503.14476, Eq. 11).
    Episodes that failed are left out, and so is a group of failed ones alone. Raises RunError when
    no group is left. Collective.
    """
    kept: list[list[Row]] = []
    uniform: list[list[Row]] = []
    drawn: Counter[int] = Counter()
    for _ in range(1 + max_refills):
        tasks = with_new_samples(source.next(num_groups - len(kept)), drawn, group_size)
        rows = _verified(sampler, verifier, tasks, draw, clock)
        rows, failed = without_failed(rows)
        if failed:
            notes.count("rollout/failed_episodes", len(failed))
            first = failed[0]
            notes.note(
                f"warning: step {draw.step}: the environments of {len(failed)} episodes failed, "
                f"the first in task {first.task.problem}: {first.verdict.reason}"
            )
        if warning := check_verdicts(rows, draw.step):
            notes.note(warning)
        for group in _groups(rows):
            (uniform if max_refills and _all_equal(group) else kept).append(group)
        if len(kept) == num_groups:
            break
    groups = (kept + uniform)[:num_groups]
    if not groups:
        raise RunError(f"step {draw.step}: every episode failed; see what the environments print")
    return [row for number, group in enumerate(groups) for row in _numbered(group, number)]


def off_policy(tasks: Sequence[Task]) -> list[Row]:
    """The tasks' traces in the place of samples.

    The terms of a method with off-policy steps are of the text, by any writer.
    """
    return [Row.of_trace(task, group).as_if_sampled() for group, task in enumerate(tasks)]


def with_new_samples(tasks: list[Task], drawn: Counter[int], group_size: int) -> list[Task]:
    """The tasks, with new sample numbers for those that the step has `drawn` before.

    That happens with few tasks, and when a refill begins an epoch.
    """
    fresh = []
    for task in tasks:
        fresh.append(replace(task, first_sample=drawn[task.index] * group_size))
        drawn[task.index] += 1
    return fresh


def _verified(
    sampler: Sampler, verifier: Verifier | None, tasks: list[Task], draw: Draw, clock: Clock
) -> list[Row]:
    with clock("generate"):
        numbers = share(list(range(len(tasks))))
        sampled = sampler.sample(share(tasks), draw)
        rows = with_episodes(sampled, lambda e: replace(e, group=numbers[e.group]))
    with clock("reward"):
        # A method that reads no rewards runs on tasks without gold answers too, which need no
        # verdict.
        if verifier and any(task.answer or task.columns for task in tasks):
            rows = verifier.score(rows)
        rows = without_columns(rows)
    with clock("gather"):
        return sorted(gather_shares(rows), key=lambda row: (row.group, row.sample, row.turn))


def without_failed(rows: Sequence[Row]) -> tuple[list[Row], list[Episode]]:
    """The rows of episodes that did not fail, and the episodes that did.

    An environment that broke tells nothing of the policy.
    """
    complete = [row for row in rows if row.episode.ended != "failed"]
    return complete, [episode for episode in episodes_of(rows) if episode.ended == "failed"]


def check_verdicts(rows: Sequence[Row], step: int) -> str | None:
    """A warning when the verifier fails on many answers, of which nothing is learned; else None.

    Raises RunError when it fails on most of them. Answers that take too long do not count, because
    a model may write them.
    """
    reasons: dict[str, list[str]] = {}  # by reward; "" where there is one
    for episode in episodes_of(rows):
        for name, verdict in episode.verdicts or (("", episode.verdict),):
            reasons.setdefault(name, []).append(verdict.reason)
    warnings = [_failures(name, of_reward, step) for name, of_reward in reasons.items()]
    return "; ".join(warning for warning in warnings if warning) or None


def _failures(name: str, reasons: Sequence[str], step: int) -> str | None:
    """What `check_verdicts` says of one reward."""
    failures = Counter(reason for reason in reasons if reason in VERIFIER_FAILURES)
    count = sum(failures.values())
    if count <= WARNED_SHARE * len(reasons):
        return None
    listed = ", ".join(f"{number} {reason}" for reason, number in failures.most_common())
    by_reward = f" by reward.rewards.{name}" if name else ""
    text = (
        f"step {step}: {count} of {len(reasons)} answers could not be judged{by_reward} ({listed})"
    )
    if count > LARGEST_SHARE * len(reasons):
        raise RunError(f"{text}; mend the gold answers of data.train, or what ends the verifier")
    return f"warning: {text}; they count as wrong"


def _groups(rows: Sequence[Row]) -> list[list[Row]]:
    by_number: dict[int, list[Row]] = {}
    for row in rows:
        by_number.setdefault(row.group, []).append(row)
    return [by_number[number] for number in sorted(by_number)]


def _all_equal(group: Sequence[Row]) -> bool:
    """True when all episodes have one reward, so that none is better than another."""
    return len({episode.reward for episode in episodes_of(group)}) == 1


def _numbered(rows: Sequence[Row], group: int) -> list[Row]:
    """The rows of one group with its number."""
    return with_episodes(rows, lambda episode: replace(episode, group=group))
