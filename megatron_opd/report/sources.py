"""The report's tables of rewards, sources and held-out sets: what they were at first, and at
last."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_opd.metrics.run_directory import Line
from megatron_opd.report.drawing import series
from megatron_opd.report.template import percent_of

_SOURCE = re.compile(r"(?:reward|eval)/source/(.+)/(?:episodes|prompts)")
_SET = re.compile(r"eval/set/([^/]+)/prompts")
_REWARD = re.compile(r"reward/of/(.+)/mean")


@dataclass(frozen=True)
class Change:
    """A number at first and at last; "" where there is none."""

    first: str = ""
    last: str = ""


@dataclass(frozen=True)
class SourceShown:
    """A row of the table of sources."""

    name: str
    episodes: str  # of the whole run
    reward: Change
    right: Change
    heldout: Change
    interval: str  # of the last evaluation


@dataclass(frozen=True)
class RewardShown:
    """A row of the table of rewards."""

    name: str
    mean: Change
    failed: str  # answers that it could not judge, in the whole run


@dataclass(frozen=True)
class SetShown:
    """A row of the table of further held-out sets."""

    name: str
    accuracy: Change
    interval: str  # of the last evaluation


def read_sets(rows: Sequence[Line]) -> list[SetShown]:
    """The further held-out sets, by name."""
    shown = []
    for name in _names(rows, _SET):
        key = f"eval/set/{name}"
        accuracy = _change(rows, f"{key}/accuracy", percent=True, evaluation=True)
        shown.append(SetShown(name, accuracy, _interval(rows, key)))
    return shown


def read_sources(rows: Sequence[Line]) -> list[SourceShown]:
    """The sources of a run's data, by name; [] where they name none."""
    return [_source(rows, name) for name in _names(rows, _SOURCE)]


def read_rewards(rows: Sequence[Line]) -> list[RewardShown]:
    """The rewards of a run's sum; [] where it has one alone."""
    shown = []
    for name in _names(rows, _REWARD):
        mean = _change(rows, f"reward/of/{name}/mean", percent=False)
        shown.append(RewardShown(name, mean, _total(rows, f"reward/of/{name}/failed")))
    return shown


def _source(rows: Sequence[Line], name: str) -> SourceShown:
    return SourceShown(
        name,
        _total(rows, f"reward/source/{name}/episodes"),
        _change(rows, f"reward/source/{name}/mean", percent=False),
        _change(rows, f"reward/source/{name}/correct/mean", percent=True),
        _change(rows, f"eval/source/{name}/accuracy", percent=True, evaluation=True),
        _interval(rows, f"eval/source/{name}"),
    )


def _interval(rows: Sequence[Line], key: str) -> str:
    """The interval of the last accuracy below a key; "" without one."""
    last = next((row for row in reversed(rows) if f"{key}/accuracy/low" in row), None)
    if last is None:
        return ""
    low = 100 * last[f"{key}/accuracy/low"]
    high = 100 * last[f"{key}/accuracy/high"]
    return f"{low:.1f} to {high:.1f}, n = {last[f'{key}/prompts']}"


def _names(rows: Sequence[Line], pattern: re.Pattern[str]) -> list[str]:
    matches = (pattern.fullmatch(key) for row in rows for key in row)
    return sorted({match[1] for match in matches if match})


def _change(rows: Sequence[Line], key: str, *, percent: bool, evaluation: bool = False) -> Change:
    """The first and last evaluation, or the means of the first and last quarter of the steps."""
    _, values = series(rows, key)
    if not len(values):
        return Change()
    size = 1 if evaluation else max(len(values) // 4, 1)
    means = [float(np.mean(values[:size])), float(np.mean(values[-size:]))]
    first, last = (percent_of(mean) if percent else f"{mean:.3f}" for mean in means)
    return Change(first if len(values) > 1 else "", last)


def _total(rows: Sequence[Line], key: str) -> str:
    _, values = series(rows, key)
    return f"{values.sum():,.0f}" if len(values) else ""
