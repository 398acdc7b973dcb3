"""What the graded samples of a suite come to: the JSON summary of `results.json`."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_opd.contracts.suites import GradedSample
from megatron_opd.errors import DataError
from megatron_opd.metrics.summary import UNANSWERED
from megatron_opd.statistics.intervals import interval_95
from megatron_opd.statistics.scores import majority, pass_at_k, question_error, seed_error

_SHUFFLES = 200
_TIMEOUTS = ("timeout", "over_budget")


@dataclass(frozen=True)
class Lengths:
    """Tokens of the completions."""

    mean: float
    median: float
    p95: float
    right: float | None  # the mean of the right ones; None without any
    wrong: float | None


@dataclass(frozen=True)
class Portion:
    """Some of the samples."""

    samples: int
    score: float


@dataclass(frozen=True)
class GroupScore:
    """The questions of one subject or level."""

    questions: int
    score: float
    low: float  # of the 95 % interval over questions
    high: float


@dataclass(frozen=True)
class Place:
    """A letter at which options stand."""

    samples: int  # whose right option stands here
    score: float | None  # of these
    chosen: int  # samples that answered this letter, wherever the right option stood


@dataclass(frozen=True)
class Options:
    """What the order of options does. A model that remembers the data is better where the right
    option has not moved; one that prefers a letter is better where it is right."""

    places: dict[str, Place]  # by letter
    spread: float  # from the letter with the lowest score to that with the highest
    chance_spread: float  # what 95 % of shuffles of the places over the samples stay below
    # the right option stands where the data has it; None where the data has it first always
    unmoved: Portion | None
    moved: Portion | None


@dataclass(frozen=True)
class SuiteSummary:
    """Scores are from 0 to 1. Every question has the same number of samples."""

    questions: int
    samples: int  # of every question
    score: float  # avg@k: the mean over questions of the mean over samples
    low: float  # of the 95 % interval over questions of this kind
    high: float
    question_error: float | None  # the standard error over questions of this kind
    seed_error: float | None  # over other seeds with these questions; None for one sample
    pass_at: dict[str, float]  # unbiased, by k: powers of two, and all samples
    majority: float | None  # maj@k; None where a program decides, not an answer
    truncated: float  # the fraction of samples that the limit of tokens cut
    unanswered: float  # the fraction of samples without an answer
    reasons: dict[str, int]  # samples by the reason of their verdict
    timeouts: int  # samples whose grading was stopped
    bad_golds: int  # questions whose gold answer nothing can be compared with
    tokens: Lengths
    options: Options | None  # None for a suite without options
    groups: dict[str, GroupScore]  # {} where all are of one group
    parts: dict[str, float]  # the means of a verdict's further scores


def summarise(samples: Sequence[GradedSample]) -> SuiteSummary:
    """The summary of all samples of one suite, in any order.

    Raises DataError where there is none, or where some questions have fewer samples than others.
    """
    rows = by_question(samples)
    score_NK = scores_of(rows)
    right_NK = np.array([[bool(one.verdict.correct) for one in row] for row in rows])
    low, high = interval_95(score_NK)
    reasons = Counter(one.verdict.reason for one in samples)
    bad_golds = {one.key for one in samples if one.verdict.reason == "bad_gold"}
    return SuiteSummary(
        questions=len(rows),
        samples=score_NK.shape[1],
        score=float(score_NK.mean()),
        low=low,
        high=high,
        question_error=question_error(score_NK),
        seed_error=seed_error(score_NK),
        pass_at=_pass_at(right_NK),
        majority=_majority(rows, score_NK),
        truncated=_mean([one.truncated for one in samples]),
        unanswered=_mean([one.verdict.reason in UNANSWERED for one in samples]),
        reasons=dict(reasons.most_common()),
        timeouts=sum(reasons[reason] for reason in _TIMEOUTS),
        bad_golds=len(bad_golds),
        tokens=_lengths(samples),
        options=_options(samples),
        groups=_groups(rows, score_NK),
        parts=_parts(samples),
    )


def by_question(samples: Sequence[GradedSample]) -> list[list[GradedSample]]:
    """The samples of every question in the order of their numbers; questions in their first
    samples' order. Raises DataError where these are not K of every question."""
    by_key: dict[str, dict[int, GradedSample]] = defaultdict(dict)
    for one in samples:
        by_key[one.key][one.sample] = one
    if not by_key:
        raise DataError("no graded samples; run the suite before it is summarised")
    numbers = sorted(next(iter(by_key.values())))
    for key, of_key in by_key.items():
        if sorted(of_key) != numbers:
            raise DataError(
                f"{samples[0].suite}: question {key} has {len(of_key)} samples, others "
                f"{len(numbers)}; run the suite to its end"
            )
    if sum(map(len, by_key.values())) != len(samples):
        raise DataError(f"{samples[0].suite}: a sample is there twice; delete the samples' file")
    return [[of_key[number] for number in numbers] for of_key in by_key.values()]


def scores_of(rows: Sequence[Sequence[GradedSample]]) -> np.ndarray:
    """float64 [N, K]."""
    return np.array([[one.verdict.score for one in row] for row in rows], dtype=np.float64)


def _pass_at(right_NK: np.ndarray) -> dict[str, float]:
    samples = right_NK.shape[1]
    numbers = {1 << power for power in range(samples.bit_length())} | {samples}
    return {str(k): float(pass_at_k(right_NK, k).mean()) for k in sorted(numbers)}


def _majority(rows: Sequence[Sequence[GradedSample]], score_NK: np.ndarray) -> float | None:
    if not any(row[0].gold for row in rows):
        return None
    votes = [[_vote(one) for one in row] for row in rows]
    return float(majority(votes, score_NK).mean())


def _vote(one: GradedSample) -> str:
    """The answer that was read; for options the place in the data of the one that was chosen,
    since every sample may have its own order."""
    chosen = _chosen(one)
    return str(one.order[chosen]) if chosen is not None else " ".join(one.verdict.extracted.split())


def _chosen(one: GradedSample) -> int | None:
    """The place of the option that was chosen, from 0; None where no letter was read."""
    letter = one.verdict.extracted
    if len(letter) != 1 or not 0 <= ord(letter) - ord("A") < len(one.order):
        return None
    return ord(letter) - ord("A")


def _lengths(samples: Sequence[GradedSample]) -> Lengths:
    tokens = np.array([one.tokens for one in samples], dtype=np.float64)
    right = np.array([bool(one.verdict.correct) for one in samples])
    return Lengths(
        mean=float(tokens.mean()),
        median=float(np.median(tokens)),
        p95=float(np.quantile(tokens, 0.95)),
        right=float(tokens[right].mean()) if right.any() else None,
        wrong=float(tokens[~right].mean()) if not right.all() else None,
    )


def _options(samples: Sequence[GradedSample]) -> Options | None:
    asked = [one for one in samples if one.order]
    if not asked:
        return None
    places = {}
    for place in range(max(len(one.order) for one in asked)):
        here = [one for one in asked if one.gold_place == place]
        chosen = sum(_chosen(one) == place for one in asked)
        score = _mean([one.verdict.score for one in here]) if here else None
        places[chr(ord("A") + place)] = Place(len(here), score, chosen)
    gold_S = np.array([one.gold_place for one in asked])
    score_S = np.array([one.verdict.score for one in asked])
    unmoved: list[GradedSample] = []
    moved: list[GradedSample] = []
    if len({one.order[one.gold_place] for one in asked}) > 1:  # not always first in the data
        for one in asked:
            stays = one.order[one.gold_place] == one.gold_place
            (unmoved if stays else moved).append(one)
    return Options(
        places, _spread(gold_S, score_S), _chance_spread(asked), _portion(unmoved), _portion(moved)
    )


def _spread(gold_S: np.ndarray, score_S: np.ndarray) -> float:
    counts = np.bincount(gold_S)
    there = counts > 0
    means = np.bincount(gold_S, score_S)[there] / counts[there]
    return float(means.max() - means.min())


def _chance_spread(asked: Sequence[GradedSample]) -> float:
    """Samples of a question that share their order are shuffled together."""
    places = defaultdict(list)
    scores = defaultdict(list)
    for one in asked:
        unit = (one.key, one.order)
        places[unit].append(one.gold_place)
        scores[unit].append(one.verdict.score)
    gold_U = np.array([of_unit[0] for of_unit in places.values()])
    score_U = np.array([np.mean(of_unit) for of_unit in scores.values()])
    rng = np.random.default_rng(0)
    return float(
        np.quantile([_spread(rng.permutation(gold_U), score_U) for _ in range(_SHUFFLES)], 0.95)
    )


def _portion(samples: Sequence[GradedSample]) -> Portion | None:
    if not samples:
        return None
    return Portion(len(samples), _mean([one.verdict.score for one in samples]))


def _groups(rows: Sequence[Sequence[GradedSample]], score_NK: np.ndarray) -> dict[str, GroupScore]:
    names = np.array([row[0].group for row in rows])
    if len(set(names)) < 2:
        return {}
    groups = {}
    for name in sorted(set(names)):
        of_group_NK = score_NK[names == name]
        low, high = interval_95(of_group_NK)
        groups[str(name)] = GroupScore(len(of_group_NK), float(of_group_NK.mean()), low, high)
    return groups


def _parts(samples: Sequence[GradedSample]) -> dict[str, float]:
    """Over all samples: one without an answer has no further scores, and counts as 0."""
    totals: dict[str, float] = defaultdict(float)
    for one in samples:
        for name, value in one.verdict.parts:
            totals[name] += value
    return {name: total / len(samples) for name, total in totals.items()}


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
