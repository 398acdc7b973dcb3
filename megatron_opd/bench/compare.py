"""Two results of the same questions, compared question by question."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from megatron_opd.bench.results import SAMPLES, SuiteResult, read_result, read_samples_by_suite
from megatron_opd.bench.summary import by_question, scores_of
from megatron_opd.contracts.suites import GradedSample
from megatron_opd.errors import DataError
from megatron_opd.statistics.paired import Difference, compare, holm, p_words
from megatron_opd.statistics.scores import seed_error

_LEVEL = 0.05


@dataclass(frozen=True)
class SuiteComparison:
    """What a suite says of the second model against the first."""

    suite: str
    questions: int
    samples: int
    first: float
    second: float
    difference: Difference
    corrected_p: float  # Holm's, over the suites compared
    sentence: str


@dataclass(frozen=True)
class Comparison:
    """All suites that both have."""

    first: str  # the directories
    second: str
    suites: list[SuiteComparison]
    left_out: list[str]  # suites that only one has
    notes: list[str]  # what differs without making the results incomparable


def compare_results(first: Path, second: Path) -> Comparison:
    """Compares two directories. Raises DataError where they have no suite in common, or where a
    suite's data, questions or protocol differ."""
    results = (read_result(first), read_result(second))
    names = [name for name in results[0].suites if name in results[1].suites]
    others = [set(result.suites).symmetric_difference(names) for result in results]
    if not names:
        listed = " and ".join(", ".join(result.suites) or "none" for result in results)
        raise DataError(f"{second}: has no suite of {first}; they have {listed}")
    for name in names:
        _check_same(name, results[0].suites[name], results[1].suites[name], second)
    samples = (
        read_samples_by_suite(first, results[0]),
        read_samples_by_suite(second, results[1]),
    )
    differences = {}
    for name in names:
        pair = _aligned(name, samples[0][name], samples[1][name], second)
        differences[name] = pair, compare(*pair)
    corrected = holm([difference.p for _, difference in differences.values()])
    compared = [
        _suite(name, pair, difference, p)
        for (name, (pair, difference)), p in zip(differences.items(), corrected, strict=True)
    ]
    notes = []
    for name in names:
        notes += _grader_notes(name, *(result.suites[name] for result in results))
        notes += _order_notes(name, samples[0][name], samples[1][name])
    return Comparison(str(first), str(second), compared, sorted(set.union(*others)), notes)


def as_json(comparison: Comparison) -> str:
    return json.dumps(asdict(comparison), indent=1, allow_nan=False)


# --------------------------------------------------------------------------------- what is the same
def _check_same(name: str, first: SuiteResult, second: SuiteResult, directory: Path) -> None:
    for field in fields(first.protocol):
        one, other = (getattr(suite.protocol, field.name) for suite in (first, second))
        if one != other and field.name not in ("name", "note"):
            raise DataError(
                f"{directory}: {name} was asked with {field.name} {_shown(other)}, the first with "
                f"{_shown(one)}; run both with one protocol"
            )
    sums = [check_sums(suite.data) for suite in (first, second)]
    if sums[0] != sums[1]:
        raise DataError(
            f"{directory}: {name} is of other data (sha256 {_short(sums[1])}, the first has "
            f"{_short(sums[0])}); run both on the same files"
        )


def check_sums(data: Mapping[str, object]) -> list[str]:
    """The check sums of the data's files, whatever their names."""
    sums = data.get("sha256")
    return sorted(map(str, sums.values() if isinstance(sums, Mapping) else [sums]))


def _short(sums: Sequence[str]) -> str:
    return ", ".join(one[:12] for one in sums)


def _shown(value: object) -> str:
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _grader_notes(name: str, first: SuiteResult, second: SuiteResult) -> list[str]:
    versions = [suite.grader.versions for suite in (first, second)]
    if versions[0] == versions[1]:
        return []
    both = " and ".join(", ".join(f"{k} {v}" for k, v in of.items()) for of in versions)
    return [f"{name}: graded by {both}; `bench regrade` grades both alike"]


def _order_notes(
    name: str, first: Sequence[GradedSample], second: Sequence[GradedSample]
) -> list[str]:
    orders = {(one.key, one.sample): one.order for one in first}
    others = sum(orders.get((one.key, one.sample), ()) != one.order for one in second)
    if not others:
        return []
    return [
        f"{name}: {others:,} samples saw their options in another order; with one seed for both "
        "the difference has a smaller error"
    ]


def _aligned(
    name: str, first: Sequence[GradedSample], second: Sequence[GradedSample], directory: Path
) -> tuple[np.ndarray, np.ndarray]:
    """The scores of both, float64 [N, K], whose rows are the same questions."""
    by_key = [{row[0].key: row for row in by_question(samples)} for samples in (first, second)]
    if by_key[0].keys() != by_key[1].keys():
        missing = len(by_key[0].keys() ^ by_key[1].keys())
        raise DataError(
            f"{directory}: {missing:,} questions of {name} are in one of the two {SAMPLES} only; "
            "run both on the same questions"
        )
    keys = list(by_key[0])
    if len(keys) < 2:
        raise DataError(f"{directory}: {name} has one question, which compares nothing")
    return scores_of(list(by_key[0].values())), scores_of([by_key[1][key] for key in keys])


# --------------------------------------------------------------------------------- what it comes to
def _suite(
    name: str, pair: tuple[np.ndarray, np.ndarray], difference: Difference, corrected_p: float
) -> SuiteComparison:
    questions, samples = pair[0].shape
    return SuiteComparison(
        suite=name,
        questions=questions,
        samples=samples,
        first=float(pair[0].mean()),
        second=float(pair[1].mean()),
        difference=difference,
        corrected_p=corrected_p,
        sentence=_sentence(name, pair, difference, corrected_p),
    )


def _sentence(
    name: str, pair: tuple[np.ndarray, np.ndarray], difference: Difference, corrected_p: float
) -> str:
    if not difference.improved and not difference.worsened:
        return f"{name}: no question scores differently; are they one model with one seed?"
    points = 100 * difference.mean
    between = f"95 %: {100 * difference.low:+.1f} to {100 * difference.high:+.1f}"
    if corrected_p <= _LEVEL:
        word = "better" if points > 0 else "worse"
        return (
            f"{name}: the second is {word} by {abs(points):.1f} points ({between}, "
            f"p {p_words(corrected_p)})"
        )
    return (
        f"{name}: {points:+.1f} points ({between}, p {p_words(corrected_p)}) do not tell the two "
        f"apart; this suite shows differences from {100 * difference.detectable:.1f} points on, "
        f"smaller ones need {_need(pair, difference)}"
    )


def _need(pair: tuple[np.ndarray, np.ndarray], difference: Difference) -> str:
    """What makes the error smaller: samples, where most of it is chance in sampling."""
    seeds = [seed_error(score_NK) for score_NK in pair]
    by_chance = sum(error**2 for error in seeds if error is not None)
    if None in seeds:
        return "several samples of every question, or more questions"
    if by_chance > difference.error**2 / 2:
        return f"more than {pair[0].shape[1]} samples of every question"
    return "more questions"
