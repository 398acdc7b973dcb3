"""The teacher's distance from what the student did, turn by turn."""

from dataclasses import replace

import numpy as np
import pytest

from megatron_opd.contracts.rows import Source
from megatron_opd.contracts.signals import TeacherSignals
from megatron_opd.metrics.gaps import FIRST_TURNS, gap_metrics
from tests.rows import row
from tests.scripted import rows_of_episodes


def said(logprobs_T: list[float] | np.ndarray) -> TeacherSignals:
    values_T = np.asarray(logprobs_T, np.float32)
    return TeacherSignals(values_T.astype(np.int32), values_T, values_T)


def test_a_turn_by_hand() -> None:
    first = row([5, 6], logprobs=[-1.0, -2.0])
    second = replace(row([7, 8, 9], logprobs=[-1.0, -1.0, -3.0]), turn=1)
    got = gap_metrics([first, second], said([-0.5, -3.0, -2.0, -99.0, -2.0]))
    gaps = [0.5, -1.0, -1.0, -29.0, 1.0]
    assert got == {
        "teacher/gap/mean": pytest.approx(np.mean(gaps)),
        "teacher/endorsed/mean": 0.4,
        "teacher/gap/turn_0/mean": pytest.approx(np.mean(gaps[:2])),
        "teacher/endorsed/turn_0/mean": 0.5,
        "teacher/gap/turn_1/mean": pytest.approx(np.mean(gaps[2:])),
        "teacher/endorsed/turn_1/mean": pytest.approx(1 / 3),
    }


def test_both_kinds_of_rows_say_the_same() -> None:
    """What an environment said is nobody's token."""
    found = []
    for kind in ("window", "growing"):
        rows = rows_of_episodes(kind, 11)
        student_T = np.concatenate([r.sources == Source.STUDENT for r in rows])
        teacher_T = np.full(len(student_T), -50.0)
        teacher_T[student_T] = np.linspace(-6, -1, student_T.sum())
        found.append(gap_metrics(rows, said(teacher_T)))
    assert found[0].keys() == found[1].keys() and "teacher/gap/turn_3/mean" in found[0]
    for key, value in found[0].items():
        assert found[1][key] == pytest.approx(value, abs=1e-6), key


def test_many_turns_share_a_number_and_one_turn_has_none() -> None:
    rows = [replace(row([5]), turn=turn) for turn in range(20)]
    got = gap_metrics(rows, said(np.linspace(-2, 0, 20)))
    assert len(got) == 2 * (FIRST_TURNS + 2)
    later = np.linspace(-2, 0, 20)[FIRST_TURNS:] + 1
    assert got["teacher/gap/later/mean"] == pytest.approx(later.mean(), abs=1e-6)
    assert gap_metrics([row([5, 6])], said([-1.0, -1.0])) == {}
