"""Engines in the ranks of one job, beside the trainer's process groups."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e import tiny_hf

PROGRAM = Path(__file__).with_name("rollout_ranks.py")


@pytest.mark.slow
def test_ranks_that_share_the_prompts_generate_what_one_would(
    run_distributed: Callable, tmp_path: Path
) -> None:
    directory = tiny_hf.write(tiny_hf.build("qwen3", seed=0), tmp_path)
    result = run_distributed(PROGRAM, 2, directory)
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["difference"] < 1e-4
