"""The learning rate of every update of a run."""

from types import SimpleNamespace

import pytest

from megatron_opd.recipe.keys import OptimizerConfig
from megatron_opd.trainer.student import learning_rates


def rates(updates: int, **settings: object) -> list[float]:
    """The rates of the updates, as `train.step.update` takes them, and of one more."""
    optimizer = SimpleNamespace(param_groups=[{}])
    schedule = learning_rates(optimizer, OptimizerConfig(1.0, **settings), updates)
    taken = []
    for _ in range(updates + 1):
        schedule.step(1)
        taken.append(optimizer.param_groups[0]["lr"])
    return taken


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"schedule": "linear"}, [1, 0.75, 0.5, 0.25, 0]),
        ({"schedule": "linear", "warmup_steps": 1}, [1, 0.75, 0.5, 0.25, 0]),
        ({"schedule": "linear", "warmup_steps": 2}, [0.5, 1, 2 / 3, 1 / 3, 0]),
        ({"schedule": "linear", "min_lr": 0.2}, [1, 0.8, 0.6, 0.4, 0.2]),
        ({"schedule": "linear", "warmup_steps": 4}, [0.25, 0.5, 0.75, 1, 0]),
        ({"schedule": "cosine"}, [1, 0.5 + 0.125**0.5, 0.5, 0.5 - 0.125**0.5, 0]),
        ({"schedule": "constant"}, [1] * 5),
        ({"schedule": "constant", "warmup_steps": 2}, [0.5, 1, 1, 1, 1]),
        ({"schedule": "linear", "warmup_steps": 9}, [1 / 9, 2 / 9, 3 / 9, 4 / 9, 5 / 9]),
    ],
)
def test_the_rate_of_every_update(settings: dict[str, object], expected: list[float]) -> None:
    """The last of them is what an update after the last would have: with min_lr = 0 no update is in
    vain."""
    assert rates(4, **settings) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_a_run_of_one_update_learns_at_the_full_rate(schedule: str) -> None:
    assert rates(1, schedule=schedule)[0] == 1
