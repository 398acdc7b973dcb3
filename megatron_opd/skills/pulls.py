"""What became of a step's retrievals."""

from collections.abc import Iterable

from megatron_opd.contracts.rows import Episode, Row, episodes_of
from megatron_opd.contracts.skills import Pull


def pulls_of(rows: Iterable[Row]) -> list[Pull]:
    """One pull for every group: its task's kind, its skill, and its mean score, in their order."""
    groups: dict[int, list[Episode]] = {}
    for episode in episodes_of(rows):
        groups.setdefault(episode.group, []).append(episode)
    return [
        (
            episodes[0].task_type,
            episodes[0].skill,
            sum(episode.verdict.score for episode in episodes) / len(episodes),
        )
        for _, episodes in sorted(groups.items())
    ]
