"""What the terms of a run's method did: plots and a table, for whatever terms and facts it has.

A step logs `objective/<term>/<fact>`: the loss, the weight, and what the term says of itself.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle

import numpy as np
from matplotlib.axes import Axes

from megatron_opd.metrics.run_directory import Line
from megatron_opd.report.drawing import COLOURS, Draw, line, plain_text, series

_KEY = re.compile(r"objective/(.+)/([^/]+)")
# The facts that terms tell today, in reading order; others stand behind under their own names.
_TITLES = {
    "weight": "Weights of the terms",
    "loss": "Loss of the terms, times their weights",
    "gate": "Gates: the share of a token that counts",
    "clip_fraction": "Tokens that the clip took out",
    "advantage": "Advantages of the terms",
    "teacher_mass": "Teacher's probability of the ids compared",
    "student_mass": "Student's probability of the ids compared",
}
_HEADINGS = {"clip_fraction": "clipped"}


@dataclass(frozen=True)
class TermsTable:
    """The first and last quarter's mean of every fact of every term."""

    facts: list[str]
    rows: list[tuple[str, list[tuple[str, str]]]]  # term, first and last per fact


def facts_of(rows: Sequence[Line]) -> dict[str, list[str]]:
    """The terms that tell a fact, by fact, in reading order."""
    keys = dict.fromkeys(key for row in rows for key in row if key.startswith("objective/"))
    terms: dict[str, list[str]] = {}
    for match in filter(None, map(_KEY.fullmatch, keys)):
        terms.setdefault(match[2], []).append(match[1])
    known = [fact for fact in _TITLES if fact in terms]
    return {fact: terms[fact] for fact in [*known, *sorted(terms.keys() - _TITLES.keys())]}


def _terms_of(facts: dict[str, list[str]]) -> list[str]:
    """Every term, in the order of the method, which the weights have."""
    return list(dict.fromkeys(term for terms in facts.values() for term in terms))


def term_plots(rows: Sequence[Line]) -> list[tuple[str, str, Draw]]:
    """Name, title and drawing of a plot per fact that changes in the run."""
    facts = facts_of(rows)
    weights_change = "weight" in _changing(rows, facts)
    plots = []
    for fact, terms in facts.items():
        changing = {
            term: colour
            for term, colour in zip(_terms_of(facts), cycle(COLOURS), strict=False)
            if term in terms and _changes(rows, f"objective/{term}/{fact}")
        }
        alone = fact == "loss" and len(terms) == 1 and not weights_change
        if changing and not alone:  # the loss of one term is that of the run
            title = _TITLES.get(fact, f"{_words(fact).capitalize()} of the terms")
            plots.append((f"term_{fact}", title, _drawing(fact, changing)))
    return plots


def read_terms(rows: Sequence[Line]) -> TermsTable | None:
    """The table of terms; None for a run that has none."""
    facts = facts_of(rows)
    if not facts:
        return None
    shown = []
    for term in _terms_of(facts):
        cells = [_ends(rows, f"objective/{term}/{fact}") for fact in facts]
        shown.append((term, cells))
    return TermsTable([_HEADINGS.get(fact, _words(fact)) for fact in facts], shown)


def _drawing(fact: str, terms: Mapping[str, str]) -> Draw:
    def draw(axes: Axes, rows: Sequence[Line]) -> bool:
        for term, colour in terms.items():
            key = f"objective/{term}/{fact}"
            lines = _weighted(rows, term) if fact == "loss" else rows
            name = plain_text(term.replace("_", " "))
            line(axes, lines, key, colour, name, smoothed=fact != "weight")
        if fact == "weight":
            axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        return bool(terms)

    return draw


def _weighted(rows: Sequence[Line], term: str) -> list[Line]:
    """The rows with a term's loss as it enters the run's: times the weight of its step."""
    key = f"objective/{term}/loss"
    weighted = []
    for row in rows:
        weight = row.get(f"objective/{term}/weight", 1.0)
        if key in row:
            value = None if row[key] is None or weight is None else row[key] * weight
            weighted.append({"step": row["step"], key: value})
    return weighted


def _changing(rows: Sequence[Line], facts: dict[str, list[str]]) -> set[str]:
    return {
        fact
        for fact, terms in facts.items()
        if any(_changes(rows, f"objective/{term}/{fact}") for term in terms)
    }


def _changes(rows: Sequence[Line], key: str) -> bool:
    """True unless a metric is the same number all the time."""
    _, values = series(rows, key)
    return len(values) > 0 and not (len(values) > 1 and bool((values == values[0]).all()))


def _ends(rows: Sequence[Line], key: str) -> tuple[str, str]:
    """The means of the first and the last quarter of a metric; "" for the first if it is the same,
    for both if the term does not tell it."""
    _, values = series(rows, key)
    values = values[np.isfinite(values)]
    if not len(values):
        return "", ""
    size = max(len(values) // 4, 1)
    first, last = (f"{float(np.mean(part)):.3g}" for part in (values[:size], values[-size:]))
    return ("" if first == last else first), last


def _words(fact: str) -> str:
    return fact.replace("_", " ")
