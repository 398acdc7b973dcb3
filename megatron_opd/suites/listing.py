"""What `megatron-opd bench list` prints: a row for every suite."""

from dataclasses import dataclass

from megatron_opd.contracts.suites import GraderName
from megatron_opd.suites.protocols import PRESETS, protocol_of
from megatron_opd.suites.table import GROUPS, SUITES


@dataclass(frozen=True)
class Listed:
    """A suite as it is listed."""

    name: str
    title: str
    questions: int | None  # None: as many as its filter leaves
    samples: dict[str, int]  # of every question, by protocol
    grader: GraderName
    data: str  # the Hub's id, and whether a token is needed
    licence: str
    note: str
    groups: tuple[str, ...]  # that have it


def listed_suites() -> list[Listed]:
    """Every suite, in the table's order."""
    return [
        Listed(
            suite.name,
            suite.title,
            suite.questions,
            {name: protocol_of(suite, name).samples for name in PRESETS},
            suite.grader,
            f"{suite.hub} (gated: a token)" if suite.gated else suite.hub,
            suite.licence,
            suite.note,
            tuple(group for group, names in GROUPS.items() if suite.name in names),
        )
        for suite in SUITES.values()
    ]
