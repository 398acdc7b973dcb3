"""The numbers of a step, under their names in `metrics.jsonl`."""

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np

from megatron_opd.contracts.rows import Rollout, TeacherSignals


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
    rollouts: Sequence[Rollout],
    teacher: TeacherSignals | None,
    weights: Mapping[str, float],
) -> dict[str, float]:
    """Metrics of a step. What several updates report is averaged; skipped updates are counted."""
    metrics = {name: float(np.mean([u[name] for u in updates])) for name in updates[0]}
    metrics["train/skipped_updates"] = sum(u["train/skipped_updates"] for u in updates)
    metrics |= {f"objective/{term}/weight": weight for term, weight in weights.items()}
    lengths = np.array([r.num_tokens for r in rollouts])
    metrics["rollout/completion_tokens/mean"] = float(lengths.mean())
    metrics["rollout/completion_tokens/max"] = float(lengths.max())
    if rollouts[0].policy_version >= 0:
        metrics["rollout/truncated/mean"] = float(
            np.mean([r.finish_reason == "length" for r in rollouts])
        )
        metrics["rollout/policy_version"] = rollouts[0].policy_version
        if any(r.given for r in rollouts):  # of traces and prefixes; rewards are of whole responses
            metrics["rollout/given_tokens/mean"] = float(np.mean([r.given for r in rollouts]))
        if drawn := [r.by_teacher for r in rollouts if r.by_teacher is not None]:
            metrics["rollout/teacher_tokens/mean"] = float(np.mean([each.sum() for each in drawn]))
        metrics |= reward_metrics(rollouts)
    if teacher is not None:
        metrics["teacher/entropy/mean"] = float(teacher.entropy_T.mean(dtype=np.float64))
        # As the log-ratios take it: a token that the teacher does not have counts as one of e^-30.
        metrics["teacher/logprob/mean"] = float(
            teacher.logprobs_T.clip(min=-30).mean(dtype=np.float64)
        )
    return metrics


UNANSWERED = ("no_answer", "truncated")


def reward_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Mean reward, the share of groups whose rewards are all equal (no policy gradient), and why
    rewards are 0.

    Where answers are verified, also the share without an answer, and how many prompts have a gold
    answer that cannot be compared with. None of this where nothing was scored.
    """
    if all(r.verdict.reason in ("unscored", "trace") for r in rollouts):
        return {}
    groups: dict[int, set[float]] = {}
    for r in rollouts:
        groups.setdefault(r.group, set()).add(r.reward)
    reasons = Counter(r.verdict.reason for r in rollouts)
    metrics = {
        "reward/mean": float(np.mean([r.reward for r in rollouts])),
        "reward/uniform_groups/mean": float(
            np.mean([len(values) == 1 for values in groups.values()])
        ),
        **{f"reward/reason/{reason}": count for reason, count in sorted(reasons.items())},
    }
    if "unscored" not in reasons:
        metrics["reward/unanswered/mean"] = unanswered(rollouts)
        metrics["reward/bad_gold"] = bad_golds(rollouts)
    return metrics


def unanswered(rollouts: Sequence[Rollout]) -> float:
    """The share of completions without an answer, cut off by the token limit or not."""
    return float(np.mean([r.verdict.reason in UNANSWERED for r in rollouts]))


def bad_golds(rollouts: Sequence[Rollout]) -> int:
    """How many prompts have a gold answer that nothing can be compared with."""
    return len({r.prompt.index for r in rollouts if r.verdict.reason == "bad_gold"})
