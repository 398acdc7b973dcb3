"""The numbers on top of a run's page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_opd.metrics.run_directory import Line
from megatron_opd.report.drawing import series
from megatron_opd.report.template import percent_of

STEP_SECONDS = "timing/step_seconds"


@dataclass(frozen=True)
class Headline:
    """A number on top of the page."""

    label: str
    value: str
    before: str = ""  # shown with an arrow towards `value`
    detail: str = ""


def headlines_of(config: Mapping[str, Any], rows: Sequence[Line]) -> list[Headline]:
    """The cards of a run, as far as it measured what they say."""
    cards = []
    _, accuracy = series(rows, "eval/accuracy")
    if len(accuracy) >= 2:
        gain = f"{100 * (accuracy[-1] - accuracy[0]):+.1f} points"
        detail = ", ".join([gain, *_interval(rows)])
        first = percent_of(accuracy[0])
        last = percent_of(accuracy[-1])
        cards.append(Headline("Held-out accuracy", last, first, detail))
    elif len(accuracy):
        detail = ", ".join(_interval(rows))
        cards.append(Headline("Held-out accuracy", percent_of(accuracy[0]), detail=detail))
    cards += _skill_headline(rows) + _answer_headlines(rows)
    _, reward = series(rows, "reward/mean")
    if len(reward) >= 2:
        first = f"{reward[0]:.3f}"
        last = f"{reward[-1]:.3f}"
        cards.append(Headline("Training reward", last, first, "first and last step"))
    _, agreement = series(rows, "teacher/agreement/mean")
    if len(agreement) >= 2:
        detail = "tokens that are the teacher's argmax"
        first = percent_of(agreement[0])
        last = percent_of(agreement[-1])
        cards.append(Headline("Teacher agreement", last, first, detail))
    detail = f"of {config['num_steps']:,}" if config else ""
    cards.append(Headline("Steps", f"{steps_done(rows):,}", detail=detail))
    _, seconds = series(rows, STEP_SECONDS)
    if len(seconds):
        detail = f"{seconds.mean():.2f} s per step"
        cards.append(Headline("Time in steps", duration(seconds.sum()), detail=detail))
    return cards + _token_headline(config, rows)


def _skill_headline(rows: Sequence[Line]) -> list[Headline]:
    """The first and last success of the student with skills to read, as a teacher reads them."""
    _, accuracy = series(rows, "eval/with_skills/accuracy")
    if not len(accuracy):
        return []
    before = percent_of(accuracy[0]) if len(accuracy) >= 2 else ""
    return [Headline("With skills", percent_of(accuracy[-1]), before, "held out")]


def _interval(rows: Sequence[Line]) -> list[str]:
    """The last evaluation's interval in words; [] for runs of earlier versions, which have none."""
    evaluations = [row for row in rows if "eval/accuracy/low" in row]
    if not evaluations:
        return []
    last = evaluations[-1]
    low = 100 * last["eval/accuracy/low"]
    high = 100 * last["eval/accuracy/high"]
    return [f"95 %: {low:.1f} to {high:.1f}, n = {last['eval/prompts']}"]


def _answer_headlines(rows: Sequence[Line]) -> list[Headline]:
    """The first and last fraction of completions without an answer.

    They are of held-out prompts if these were evaluated, else of training.
    """
    for place, prefix, rollout in (
        ("held out", "eval", "eval"),
        ("in training", "reward", "rollout"),
    ):
        _, unanswered = series(rows, f"{prefix}/unanswered/mean")
        _, truncated = series(rows, f"{rollout}/truncated/mean")
        if len(unanswered) and len(truncated):
            before = percent_of(unanswered[0]) if len(unanswered) >= 2 else ""
            detail = f"{place}, {percent_of(truncated[-1])} cut off at the token limit"
            return [Headline("Without an answer", percent_of(unanswered[-1]), before, detail)]
    return []


def _token_headline(config: Mapping[str, Any], rows: Sequence[Line]) -> list[Headline]:
    _, mean_tokens = series(rows, "rollout/completion_tokens/mean")
    rollout = config.get("rollout") or {}
    if not len(mean_tokens) or not {"num_prompts", "samples_per_prompt"} <= rollout.keys():
        return []
    sampled = any("rollout/policy_version" in row for row in rows)
    responses = rollout["num_prompts"] * (rollout["samples_per_prompt"] if sampled else 1)
    detail = f"in {responses * len(mean_tokens):,} responses"
    label = "Tokens sampled" if sampled else "Tokens read"
    return [Headline(label, _count(mean_tokens.sum() * responses), detail=detail)]


def steps_done(rows: Sequence[Line]) -> int:
    """The number of steps; lines without a step time are evaluations between steps."""
    return max((row["step"] + (STEP_SECONDS in row) for row in rows), default=0)


def effort_words(rows: Sequence[Line], planned: int | None) -> str:
    """Steps and minutes: "in 100 steps and 2 min 05 s", "after 40 of 100 steps"."""
    done = steps_done(rows)
    if planned and done < planned:
        return f"after {done:,} of {planned:,} steps"
    seconds = time_in_steps(rows)
    words = f"in {done:,} step{'s' * (done != 1)}"
    return f"{words} and {duration(seconds)}" if seconds else words


def time_in_steps(rows: Sequence[Line]) -> float:
    """The seconds of all steps together."""
    return float(np.nansum(series(rows, STEP_SECONDS)[1]))


def duration(seconds: float) -> str:
    """Seconds in words."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def _count(number: float) -> str:
    for unit, size in (("billion", 1e9), ("million", 1e6)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:,.0f}"
