"""Engines on processes of their own: samples, refit and failures are those of engines beside the
student."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.distributed import rollout_roles
from tests.e2e import tiny_hf


@pytest.fixture(scope="module")
def found(
    run_distributed: Callable, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """What each of the student's two processes found."""
    directory = tiny_hf.write(tiny_hf.build("qwen3", seed=0), tmp_path_factory.mktemp("model"))
    ranks = rollout_roles.STUDENT + rollout_roles.ENGINES
    result = run_distributed(rollout_roles.__file__, ranks, directory)
    return json.loads(next(line for line in result.stdout.splitlines() if line.startswith("[{")))


def test_samples_are_of_the_weights_that_were_sent(found: list[dict[str, Any]]) -> None:
    tensors = dict(tiny_hf.build("qwen3", seed=0).named_parameters())
    for each in found:
        assert each["difference"] < 1e-4 and each["order"]
        assert each["tensors"] == len(tensors) and each["bytes"] == sum(
            4 * t.numel() for t in tensors.values()
        )


def test_an_engine_that_failed_is_started_again(found: list[dict[str, Any]]) -> None:
    """The last of the engines fails, and all of the student's processes learn of it."""
    for each in found:
        assert each["fails"].startswith("RunError: vLLM failed while generating: ZeroDivisionError")
        assert (
            each["restarted"]
            == "RunError: rollouts of policy version 1 asked of an engine that holds None"
        )
        assert each["the same"]


@pytest.mark.parametrize(
    ("what", "problem"),
    [
        ("too long", "ConfigError: max_sequence_length=999 is more than"),
        (
            "without weights",
            "RunError: rollouts of policy version 1 asked of an engine that holds None",
        ),
        (
            "missing",
            "RunError: weights for vLLM: 1 tensors did not arrive, first model.norm.weight",
        ),
        ("lost", f"RunError: refit: {rollout_roles.LOST} in vLLM is not the tensor that was sent"),
        ("unverified", "RunError: rollouts of policy version 2 asked of an engine that holds None"),
    ],
)
def test_what_an_engine_refuses_is_raised_on_the_students_processes(
    found: list[dict[str, Any]], what: str, problem: str
) -> None:
    for each in found:
        assert each[what].startswith(problem) and "\n" not in each[what]
