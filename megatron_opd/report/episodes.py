"""Episodes of many turns chosen for the report: what was seen, written, done and paid."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_opd.metrics.run_directory import Line, read_rollouts, rollout_files
from megatron_opd.report.samples import Cell, cells_of, shorten

_PER_STEP = 3  # episodes of a step, one of them lost if there is one
_MAX_OBSERVATION = 600  # characters
_MAX_TURNS = 12


@dataclass(frozen=True)
class TurnShown:
    """A turn of the page."""

    number: int
    observation: str
    cells: list[Cell]  # what the model wrote; empty for a later turn of a row that grew
    action: str
    valid: bool
    reward: str


@dataclass(frozen=True)
class EpisodeShown:
    """An episode of the page."""

    task: str
    task_type: str
    skill: str
    verdict: str  # "right" or "wrong"
    reason: str
    reward: str
    turns: list[TurnShown]
    num_hidden: int  # turns that are not shown


@dataclass(frozen=True)
class EpisodesOfStep:
    """The episodes of one step."""

    step: int
    episodes: list[EpisodeShown]


def read_episodes(run_dir: Path) -> list[EpisodesOfStep]:
    """Episodes of the first and the last step that has some. [] for a run without turns."""
    files = rollout_files(run_dir)
    shown = []
    for step in dict.fromkeys([*list(files)[:1], *list(files)[-1:]]):
        episodes = _episodes(read_rollouts(files[step]))
        if episodes:
            shown.append(EpisodesOfStep(step, [_shown(rows) for rows in _choose(episodes)]))
    return shown


def _episodes(rows: Sequence[Line]) -> list[list[Line]]:
    """The rows of every episode, by turn."""
    by_key: dict[tuple[int, int], list[Line]] = {}
    for row in rows:
        if row.get("exchanges"):
            by_key.setdefault((row["prompt_index"], row["sample"]), []).append(row)
    return list(by_key.values())


def _choose(episodes: Sequence[list[Line]]) -> list[list[Line]]:
    won = [rows for rows in episodes if rows[0]["reward_reason"] == "won"]
    lost = [rows for rows in episodes if rows[0]["reward_reason"] != "won"]
    num_won = max(_PER_STEP - len(lost), min(len(won), _PER_STEP - 1))
    return won[:num_won] + lost[: _PER_STEP - min(num_won, len(won))]


def _shown(rows: Sequence[Line]) -> EpisodeShown:
    first = rows[0]
    turns = [turn for row in rows for turn in _turns(row)]
    return EpisodeShown(
        task=shorten(first["prompt"] or first["problem"], _MAX_OBSERVATION),
        task_type=first["task_type"],
        skill=first["skill"],
        verdict="right" if first["reward_reason"] == "won" else "wrong",
        reason=first["reward_reason"],
        reward=f"{max(row['reward'] for row in rows):g}",
        turns=turns[:_MAX_TURNS],
        num_hidden=max(len(turns) - _MAX_TURNS, 0),
    )


def _turns(row: Line) -> list[TurnShown]:
    """The turns of a row; a row that grew shows all its tokens with the first."""
    turns = []
    for place, exchange in enumerate(row["exchanges"]):
        shown = TurnShown(
            number=row.get("turn", 0) + place + 1,
            observation=shorten(exchange["observation"], _MAX_OBSERVATION),
            cells=[] if place else cells_of(row),
            action=exchange["action"],
            valid=exchange["valid"],
            reward=f"{exchange['reward']:g}",
        )
        turns.append(shown)
    return turns
