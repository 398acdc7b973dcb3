"""Sampled rows chosen for the report, and their tokens as cells."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_opd.contracts.rows import Source
from megatron_opd.metrics.run_directory import Line, read_rollouts, rollout_files

_PER_GROUP = 4  # samples of a step, half of them right if there are enough
_HEAD = 280  # first tokens of a response that is too long
_TAIL = 60  # and its last ones
_MAX_PROBLEM = 800  # characters
_MAX_ANSWER = 200
# Below this probability of the student's token under the teacher, a disagreement is strong.
_UNLIKELY = 0.1


@dataclass(frozen=True)
class Cell:
    """A token of the page."""

    text: str
    css: str  # "", "differs", "differs strongly" or "environment"
    tip: str
    breaks: bool  # the token ends a line


@dataclass(frozen=True)
class Sample:
    """A row of the page."""

    problem: str
    answer: str
    verdict: str  # "right", "wrong" or "" for a response of the data set, which has no reward
    reward: str
    reason: str
    finish_reason: str
    num_tokens: int
    disagreement: float | None  # fraction of the tokens, in [0, 1]
    head: list[Cell]
    num_hidden: int
    tail: list[Cell]


@dataclass(frozen=True)
class Group:
    """The samples of one step; `disagreement` is over every recorded token of it."""

    step: int
    samples: list[Sample]
    disagreement: float | None


def read_groups(run_dir: Path, metrics: Sequence[Line]) -> list[Group]:
    """Samples of the first and the last step that the teacher scored, or else that have samples.

    A guidance that is annealed stops asking the teacher when its weight is 0. [] for a run without
    row files.
    """
    files = rollout_files(run_dir)
    scored = [row["step"] for row in metrics if "teacher/entropy/mean" in row]
    steps = [step for step in scored if step in files] or list(files)
    groups = []
    for step in dict.fromkeys([steps[0], steps[-1]]) if steps else ():
        # Episodes of turns have a section of their own.
        rows = [row for row in read_rollouts(files[step]) if not row.get("exchanges")]
        if rows:
            samples = [_sample(row) for row in _choose(rows)]
            groups.append(Group(step, samples, _disagreement(rows)))
    return groups


def _choose(rows: Sequence[Line]) -> list[Line]:
    """Right and wrong samples, if possible as many of each, and of different prompts."""
    seen: dict[int, int] = {}
    ranked = []
    for order, row in enumerate(rows):
        repeat = seen[row["prompt_index"]] = seen.get(row["prompt_index"], -1) + 1
        ranked.append((repeat, order, row))
    ranked.sort(key=lambda item: item[:2])
    right = [row for _, _, row in ranked if row["reward"] > 0]
    wrong = [row for _, _, row in ranked if row["reward"] <= 0]
    num_right = min(len(right), max(_PER_GROUP // 2, _PER_GROUP - len(wrong)))
    return right[:num_right] + wrong[: _PER_GROUP - num_right]


def _sample(row: Line) -> Sample:
    count = len(row["token_ids"])
    hidden = range(_HEAD, count - _TAIL) if count > _HEAD + _TAIL else range(0)
    verdict = ""
    if row["policy_version"] >= 0:
        verdict = "right" if row["reward"] > 0 else "wrong"
    return Sample(
        problem=shorten(row["problem"], _MAX_PROBLEM),
        answer=shorten(row["answer"], _MAX_ANSWER),
        verdict=verdict,
        reward=f"{row['reward']:g}",
        reason=row["reward_reason"].replace("_", " "),
        finish_reason=row["finish_reason"],
        num_tokens=len(_written(row)),
        disagreement=_disagreement([row]),
        head=[_cell(row, index) for index in range(hidden.start if hidden else count)],
        num_hidden=len(hidden),
        tail=[_cell(row, index) for index in range(hidden.stop, count)] if hidden else [],
    )


def _cell(row: Line, index: int) -> Cell:
    text = _token(row["token_ids"], row["tokens"], index)
    if _by_environment(row, index):
        return Cell(
            _visible(text), "environment", "written by the environment", text.endswith("\n")
        )
    tip = []
    if index < len(row["logprobs"]):
        tip.append(f"student  {_logprob(row['logprobs'][index])}")
    css = ""
    if teacher := row.get("teacher"):
        logprob = teacher["logprobs"][index]
        tip.append(f"teacher  {_logprob(logprob)}")
        tip.append(f"entropy  {_number(teacher['entropy'][index])} nats")
        if teacher["argmax_ids"][index] != row["token_ids"][index]:
            likely = logprob is not None and math.exp(logprob) >= _UNLIKELY
            css = "differs" if likely else "differs strongly"
            argmax = _token(teacher["argmax_ids"], teacher["argmax_tokens"], index)
            tip.append(f"teacher's token  {_visible(argmax)}")
    return Cell(_visible(text), css, "\n".join(tip), text.endswith("\n"))


def _written(row: Line) -> list[int]:
    """The places of the tokens that a model or a trace wrote."""
    return [index for index in range(len(row["token_ids"])) if not _by_environment(row, index)]


def _by_environment(row: Line, index: int) -> bool:
    return "sources" in row and row["sources"][index] == Source.ENVIRONMENT


def _token(ids: list[int], texts: list[str] | None, index: int) -> str:
    return texts[index] if texts else f"{ids[index]} "


def _visible(token: str) -> str:
    return token.replace("\n", "↵").replace("\t", "⇥").replace("\r", "␍") or "∅"


def _logprob(value: float | None) -> str:
    return "not finite" if value is None else f"logprob {value:.3f}  p {math.exp(value):.3f}"


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3f}"


def _disagreement(rows: Sequence[Line]) -> float | None:
    """The fraction of tokens that are not the teacher's argmax; None without a teacher."""
    differs = []
    for row in rows:
        if row.get("teacher"):
            argmax_ids = row["teacher"]["argmax_ids"]
            differs += [row["token_ids"][i] != argmax_ids[i] for i in _written(row)]
    return sum(differs) / len(differs) if differs else None


def cells_of(row: Line) -> list[Cell]:
    """The tokens of a row, the last ones left out where there are too many."""
    return [_cell(row, index) for index in range(min(len(row["token_ids"]), _HEAD))]


def shorten(text: str, limit: int) -> str:
    """The first characters of a text, and the number of all where some are left out."""
    return text if len(text) <= limit else f"{text[:limit]} … ({len(text):,} characters)"
