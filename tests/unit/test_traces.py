"""Which of a prompt's responses become traces."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import pytest

from megatron_opd.contracts.rows import Episode, Row, Task, Verdict, with_episodes
from megatron_opd.contracts.sampling import Draw
from megatron_opd.evaluation.traces import Keep, traces_of
from megatron_opd.recipe.keys import RolloutConfig, RunConfig
from megatron_opd.recipe.load import load_config

# lengths of a prompt's responses, one per round; negative: wrong, 0: cut off
LENGTHS = {0: (-3, 9, 4, 4), 1: (-1, -1, -1, -1), 2: (7, 0, 5, 8)}


@dataclass
class Scripted:
    """A sampler whose responses are given, and the verifier that knows them."""

    asked: list[list[int]] = field(default_factory=list)

    def sample(self, tasks: Sequence[Task], draw: Draw) -> list[Row]:
        assert draw.samples == 1
        self.asked.append([task.index for task in tasks])
        rows = []
        for group, task in enumerate(tasks):
            length = LENGTHS[task.index][draw.step]
            ids = np.arange(abs(length) or 12, dtype=np.int32)
            reason = "stop" if length else "length"
            row = Row.of_student(
                Episode(task, 0, group), ids, np.zeros(len(ids), np.float32), version=0,
                text=str(length), finish_reason=reason,
            )  # fmt: skip
            rows.append(row)
        return rows

    def score(self, rows: Sequence[Row]) -> list[Row]:
        judged = []
        for row in rows:
            right = int(row.text) > 0
            verdict = Verdict(float(right), right, "correct" if right else "wrong")
            judged += with_episodes([row], partial(replace, verdict=verdict))
        return judged


@pytest.fixture(scope="module")
def config() -> RunConfig:
    config = load_config("demo")
    return replace(config, rollout=replace(RolloutConfig(), num_prompts=2))


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        ("first", [(0, 1, 9), (2, 0, 7)]),
        ("shortest", [(0, 2, 4), (2, 2, 5)]),
        ("all", [(0, 1, 9), (0, 2, 4), (0, 3, 4), (2, 0, 7), (2, 2, 5), (2, 3, 8)]),
    ],
)
def test_right_responses_are_kept(
    config: RunConfig, keep: Keep, expected: list[tuple[int, int, int]]
) -> None:
    scripted = Scripted()
    tasks = [Task(index, "", "", "", np.zeros(1, np.int32)) for index in LENGTHS]
    rows = traces_of(tasks, scripted, scripted, config, 4, 1.0, keep)
    assert [(row.task.index, row.sample, row.num_tokens) for row in rows] == expected
    asked = [[0, 1], [2], [0, 1], [1], [1]] if keep == "first" else [[0, 1], [2]] * 4
    assert scripted.asked == asked


def test_whether_they_are_right_matters_only_to_a_verifier(config: RunConfig) -> None:
    tasks = [Task(index, "", "", "", np.zeros(1, np.int32)) for index in LENGTHS]
    rows = traces_of(tasks, Scripted(), None, config, 2, 1.0, "shortest")
    assert [(row.task.index, row.sample) for row in rows] == [(0, 0), (1, 0), (2, 0)]
    greedy = traces_of(tasks, Scripted(), None, config, 4, 0.0, "all")
    assert len(greedy) == 3  # a greedy response would only be repeated
