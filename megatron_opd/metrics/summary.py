"""The numbers of a step, under their names in `metrics.jsonl`."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np

from megatron_opd.contracts.rows import (
    NOT_JUDGED,
    Episode,
    Row,
    Source,
    Verdict,
    episodes_of,
)
from megatron_opd.contracts.signals import TeacherSignals
from megatron_opd.metrics.gaps import gap_metrics
from megatron_opd.metrics.turns import episode_metrics


class Clock:
    """Seconds per phase of a step: `with clock("train"): ...`."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._phases: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._phases[phase] = self._phases.get(phase, 0.0) + time.perf_counter() - start

    def metrics(self) -> dict[str, float]:
        """timing/<phase>_seconds, and timing/step_seconds since the clock was made."""
        phases = {f"timing/{phase}_seconds": seconds for phase, seconds in self._phases.items()}
        return {**phases, "timing/step_seconds": time.perf_counter() - self._start}


def summarise(
    updates: Sequence[Mapping[str, float]],
    rows: Sequence[Row],
    teacher: TeacherSignals | None,
    weights: Mapping[str, float],
) -> dict[str, float]:
    """Metrics of a step: means over its updates, and the count of updates that were skipped."""
    metrics = {name: float(np.mean([u[name] for u in updates])) for name in updates[0]}
    metrics["train/skipped_updates"] = sum(u["train/skipped_updates"] for u in updates)
    metrics |= {f"objective/{term}/weight": weight for term, weight in weights.items()}
    lengths = np.array([r.num_written for r in rows])
    metrics["rollout/completion_tokens/mean"] = float(lengths.mean())
    metrics["rollout/completion_tokens/max"] = float(lengths.max())
    if rows[0].version >= 0:
        metrics["rollout/truncated/mean"] = float(np.mean([r.truncated for r in rows]))
        metrics["rollout/policy_version"] = rows[0].version
        if any(r.num_given for r in rows):  # of traces and prefixes; rewards are of whole responses
            metrics["rollout/given_tokens/mean"] = float(np.mean([r.num_given for r in rows]))
        drawn = [(r.sources == Source.TEACHER).sum() for r in rows if r.version >= 0]
        if any(drawn):
            metrics["rollout/teacher_tokens/mean"] = float(np.mean(drawn))
        metrics |= reward_metrics(rows) | episode_metrics(rows, "rollout")
    if teacher is not None:
        written_T = np.concatenate([r.written_T for r in rows])
        metrics["teacher/entropy/mean"] = float(teacher.entropy_T[written_T].mean(dtype=np.float64))
        # In the log-ratios too, a token that the teacher does not have counts as one of e^-30.
        logprobs_T = teacher.logprobs_T[written_T].clip(min=-30)
        metrics["teacher/logprob/mean"] = float(logprobs_T.mean(dtype=np.float64))
        metrics |= gap_metrics(rows, teacher)
    return metrics


UNANSWERED = ("no_answer", "truncated")
MOST_SOURCES = 50  # with metrics of their own
_LOST = (*NOT_JUDGED, "timeout")  # reasons of a score of 0 that says nothing of the answer


def reward_metrics(rows: Sequence[Row]) -> dict[str, float]:
    """Mean reward, fraction of groups with equal rewards (no policy gradient), counts of reasons.

    All are over episodes. If answers are verified, there are also the fraction without an answer,
    and the number of prompts whose gold answer nothing can be compared with. {} if nothing was
    scored.
    """
    episodes = episodes_of(rows)
    if all(e.verdict.reason in ("unscored", "trace") for e in episodes):
        return {}
    groups: dict[int, set[float]] = {}
    for e in episodes:
        groups.setdefault(e.group, set()).add(e.reward)
    reasons = Counter(e.verdict.reason for e in episodes)
    uniform = [len(values) == 1 for values in groups.values()]
    metrics = {
        "reward/mean": float(np.mean([e.reward for e in episodes])),
        "reward/uniform_groups/mean": float(np.mean(uniform)),
        **{f"reward/reason/{reason}": count for reason, count in sorted(reasons.items())},
    }
    if "unscored" not in reasons:
        metrics["reward/unanswered/mean"] = unanswered(rows)
        metrics["reward/bad_gold"] = bad_golds(rows)
    return metrics | by_reward(episodes, "reward") | _by_source(episodes)


def by_reward(episodes: Sequence[Episode], prefix: str) -> dict[str, float]:
    """The mean of every reward of a sum, and how many answers it could not judge."""
    verdicts: dict[str, list[Verdict]] = {}
    for episode in episodes:
        for name, verdict in episode.verdicts:
            verdicts.setdefault(name, []).append(verdict)
    metrics: dict[str, float] = {}
    for name, of_reward in verdicts.items():
        metrics[f"{prefix}/of/{name}/mean"] = float(np.mean([v.score for v in of_reward]))
        lost = sum(v.reason in _LOST for v in of_reward)
        metrics[f"{prefix}/of/{name}/failed"] = lost
    return metrics


def by_source[T](items: Sequence[T], source_of: Callable[[T], str]) -> dict[str, list[T]]:
    """The items of every source of the data, by name; {} where rows name none, or very many."""
    sources: dict[str, list[T]] = {}
    for item in items:
        sources.setdefault(source_of(item), []).append(item)
    sources.pop("", None)
    return dict(sorted(sources.items())) if len(sources) <= MOST_SOURCES else {}


def _by_source(episodes: Sequence[Episode]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for source, own in by_source(episodes, lambda episode: episode.task.source).items():
        metrics[f"reward/source/{source}/mean"] = float(np.mean([e.reward for e in own]))
        right = [bool(e.verdict.correct) for e in own]
        metrics[f"reward/source/{source}/correct/mean"] = float(np.mean(right))
        metrics[f"reward/source/{source}/episodes"] = len(own)
    return metrics


def unanswered(rows: Sequence[Row]) -> float:
    """The fraction of episodes without an answer, cut off by the token limit or not."""
    return float(np.mean([e.verdict.reason in UNANSWERED for e in episodes_of(rows)]))


def bad_golds(rows: Sequence[Row]) -> int:
    """The number of prompts whose gold answer nothing can be compared with."""
    return len({r.task.index for r in rows if r.verdict.reason == "bad_gold"})
