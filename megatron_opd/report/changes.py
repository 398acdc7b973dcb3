"""Before and after: the problems that a run gained and lost, with what was answered."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_opd.metrics.run_directory import Line
from megatron_opd.report.evaluations import Attempt, Evaluation, Key, Pair
from megatron_opd.report.samples import shorten

_SHOWN = 3  # problems of a kind
_MAX_PROBLEM = 600  # characters
_MAX_ANSWER = 1200


@dataclass(frozen=True)
class Side:
    """One of the answers to a problem."""

    step: int
    solved: str  # "2 of 8 right", or "right"
    verdict: str  # "right" or "wrong"
    reason: str
    text: str


@dataclass(frozen=True)
class ProblemShown:
    """A problem with an answer of the first and one of the last evaluation."""

    problem: str
    answer: str
    before: Side
    after: Side


@dataclass(frozen=True)
class Kind:
    """The problems that changed alike."""

    name: str  # "gained", "lost", "still right", "still wrong", "as before"
    css: str
    count: int
    share: float  # of all problems, in percent
    problems: list[ProblemShown]


@dataclass(frozen=True)
class Changes:
    """Every problem of both evaluations, by what became of it."""

    total: int
    kinds: list[Kind]


def changes_of(pair: Pair | None) -> Changes | None:
    """What became of the problems of a pair."""
    if pair is None:
        return None
    by_name: dict[str, list[Key]] = {name: [] for name in _CSS}
    for key in pair.keys:
        by_name[_kind(pair.first.score(key), pair.last.score(key))].append(key)
    kinds = []
    for name, keys in by_name.items():
        keys.sort(key=lambda key: -abs(pair.last.score(key) - pair.first.score(key)))
        shown = keys[: _SHOWN if name in ("gained", "lost") else 1 if name == "still wrong" else 0]
        problems = [_problem(pair, key) for key in shown]
        share = 100 * len(keys) / len(pair.keys)
        kinds.append(Kind(name, _CSS[name], len(keys), share, problems))
    return Changes(len(pair.keys), [kind for kind in kinds if kind.count])


_CSS = {
    "gained": "gained",
    "still right": "kept",
    "as before": "same",
    "still wrong": "missed",
    "lost": "lost",
}


def _kind(before: float, after: float) -> str:
    if before != after:
        return "gained" if after > before else "lost"
    return {0.0: "still wrong", 1.0: "still right"}.get(before, "as before")


def _problem(pair: Pair, key: Key) -> ProblemShown:
    gained = pair.last.score(key) > pair.first.score(key)
    row = pair.last.attempts[key][0].rows[0]
    return ProblemShown(
        problem=shorten(row["problem"], _MAX_PROBLEM),
        answer=shorten(row["answer"], _MAX_ANSWER),
        before=_side(pair.first, key, prefer_right=not gained),
        after=_side(pair.last, key, prefer_right=gained),
    )


def _side(evaluation: Evaluation, key: Key, *, prefer_right: bool) -> Side:
    attempts = evaluation.attempts[key]
    shown = next((one for one in attempts if one.right == prefer_right), attempts[0])
    num_right = sum(one.right for one in attempts)
    return Side(
        step=evaluation.step,
        solved=f"{num_right} of {len(attempts)} right" if len(attempts) > 1 else "",
        verdict="right" if shown.right else "wrong",
        reason=str(shown.rows[0]["reward_reason"]).replace("_", " "),
        text=_text(shown),
    )


def _text(attempt: Attempt) -> str:
    """What was answered; of an episode, what was seen and done at every turn."""
    lines: list[str] = []
    for row in attempt.rows:
        lines += _turns(row["exchanges"]) if row.get("exchanges") else [row["completion"]]
    return shorten("\n".join(lines), _MAX_ANSWER)


def _turns(exchanges: Sequence[Line]) -> list[str]:
    return [
        f"sees {shorten(turn['observation'], 200)}\n  does {turn['action']}"
        f"{'' if turn['valid'] else ' (not valid)'}"
        for turn in exchanges
    ]
