"""Which rollouts each update of a step learns from."""

import pytest

from megatron_opd.contracts.rows import Row
from megatron_opd.errors import RunError
from megatron_opd.trainer.step import shares_of_groups
from tests.rows import row, task


def rows_of(*sizes: int) -> list[Row]:
    """Groups of these sizes, one token each."""
    return [
        row([0], of=task(), sample=sample, group=group)
        for group, size in enumerate(sizes)
        for sample in range(size)
    ]


@pytest.mark.parametrize(
    ("sizes", "updates", "ends"),
    [
        ((2, 2, 2, 2), 2, [4, 8]),
        ((2, 2, 2, 2), 4, [2, 4, 6, 8]),
        ((3, 1, 2), 1, [6]),
        ((3, 1, 2), 2, [3, 6]),  # 1 group and 2
        ((5, 1, 1, 1, 1), 2, [6, 9]),  # 2 groups and 3
        ((1, 4, 1), 3, [1, 5, 6]),
    ],
)
def test_updates_share_out_whole_groups_and_leave_none_out(
    sizes: tuple[int, ...], updates: int, ends: list[int]
) -> None:
    rows = rows_of(*sizes)
    shares = shares_of_groups(rows, updates)
    assert [share.stop for share in shares] == ends
    assert [r for share in shares for r in rows[share]] == rows


def test_fewer_groups_than_updates_are_refused() -> None:
    with pytest.raises(RunError, match=r"train\.updates_per_step: 3 updates of 2 groups"):
        shares_of_groups(rows_of(4, 4), 3)
