"""How far the teacher is from what the student did, turn by turn: the alarms of a self-teacher.

A teacher that is the student with a text in front of it must stay better than it, and its opinion
lies in few tokens. A mean gap that goes to 0 says that the weights have lost the reading of the
text.
"""

from collections.abc import Sequence

import numpy as np

from megatron_opd.contracts.rows import Row, Source
from megatron_opd.contracts.signals import TeacherSignals

FIRST_TURNS = 8  # have a number of their own; later ones share one


def gap_metrics(rows: Sequence[Row], teacher: TeacherSignals) -> dict[str, float]:
    """The mean of log p_teacher - log p_sampler over the student's tokens, over those of actions
    and over those of each turn, and the share of tokens that the teacher likes better.

    The gates of SDAR are above a half at tokens that the teacher likes better.
    {} where every episode has one turn. A token that the teacher does not have counts as one of
    e^-30.
    """
    turn_T = np.concatenate([r.turn_T for r in rows])
    if not turn_T.any():
        return {}
    drawn_T = np.concatenate([(r.sources == Source.STUDENT) & (r.versions >= 0) for r in rows])
    own_T = np.concatenate([r.logprobs for r in rows])
    gap_T = teacher.logprobs_T.clip(min=-30).astype(np.float64) - own_T
    metrics = _of("", gap_T[drawn_T])
    acting = [np.zeros(r.num_tokens, bool) if r.action_T is None else r.action_T for r in rows]
    metrics |= _of("/actions", gap_T[drawn_T & np.concatenate(acting)])
    for turn in range(min(int(turn_T.max()) + 1, FIRST_TURNS + 1)):
        later = turn == FIRST_TURNS
        of_turn_T = drawn_T & (turn_T >= turn if later else turn_T == turn)
        metrics |= _of("/later" if later else f"/turn_{turn}", gap_T[of_turn_T])
    return metrics


def _of(name: str, gaps: np.ndarray) -> dict[str, float]:
    if not len(gaps):
        return {}
    return {
        f"teacher/gap{name}/mean": float(gaps.mean()),
        f"teacher/endorsed{name}/mean": float((gaps > 0).mean()),
    }
