"""What a run comes to, in a sentence."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_opd.metrics.run_directory import Line
from megatron_opd.report.drawing import series
from megatron_opd.report.evaluations import Pair
from megatron_opd.report.template import percent_of
from megatron_opd.statistics.paired import p_words


@dataclass(frozen=True)
class Verdict:
    """The sentence on top of the page."""

    kind: str  # "better", "worse" or "open"
    sentence: str
    detail: str  # what the sentence rests on


def verdict_of(rows: Sequence[Line], pair: Pair | None, effort: str) -> Verdict:
    """The verdict on a run; `effort` are its steps and minutes in words."""
    if pair is not None:
        return _of_pair(pair, effort)
    _, accuracy = series(rows, "eval/accuracy")
    if len(accuracy) >= 2:
        return Verdict(
            "open",
            f"Held-out accuracy was {percent_of(accuracy[0])} and is {percent_of(accuracy[-1])} "
            f"{effort}; whether that is more than chance cannot be said.",
            "The answers of the two evaluations are not in heldout/ as the same problems, so their "
            "difference has no interval.",
        )
    if len(accuracy):
        return Verdict(
            "open",
            f"Held-out accuracy is {percent_of(accuracy[0])}, evaluated once {effort}: there is "
            "nothing to compare it with yet.",
            "",
        )
    return _of_reward(rows, effort)


def _of_pair(pair: Pair, effort: str) -> Verdict:
    difference = pair.difference
    first = percent_of(pair.first.accuracy(pair.keys))
    last = percent_of(pair.last.accuracy(pair.keys))
    interval = f"95 %: {points(difference.low)} to {points(difference.high)}"
    rests_on = (
        f"{len(pair.keys):,} held-out problems, before step {pair.first.step} and before step "
        f"{pair.last.step}: {difference.improved:,} answered better, {difference.worsened:,} worse "
        f"({difference.test} p {p_words(difference.p)}). The interval is over problems; another "
        "seed may train to another result."
    )
    if pair.certain:
        better = difference.mean > 0
        return Verdict(
            "better" if better else "worse",
            f"Held-out accuracy {'rose' if better else 'fell'} from {first} to {last} {effort}: "
            f"{points(difference.mean)} points ({interval}).",
            rests_on,
        )
    return Verdict(
        "open",
        f"No certain change {effort}: held-out accuracy was {first} and is {last}, "
        f"{points(difference.mean)} points ({interval}).",
        f"{rests_on} So many problems show differences from "
        f"{100 * difference.detectable:.1f} points on.",
    )


def _of_reward(rows: Sequence[Line], effort: str) -> Verdict:
    _, reward = series(rows, "reward/mean")
    if len(reward) < 2:
        return Verdict("open", "Nothing was evaluated, so nothing can be said of the result.", "")
    size = max(len(reward) // 4, 1)
    first = float(np.nanmean(reward[:size])) if np.isfinite(reward[:size]).any() else np.nan
    last = float(np.nanmean(reward[-size:])) if np.isfinite(reward[-size:]).any() else np.nan
    return Verdict(
        "open",
        f"Training reward went from {first:.3f} to {last:.3f} {effort}; nothing was evaluated on "
        "held-out problems, so this says nothing of new ones.",
        f"Means of the first and the last {'quarter of the steps' if size > 1 else 'step'}.",
    )


def points(difference: float) -> str:
    """A difference of two fractions, in points of a percentage."""
    return f"{100 * difference:+.1f}"
