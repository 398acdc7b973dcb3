"""The loop runs on an engine that is not ours: 30 lines that keep the contract of a station."""

import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_opd.contracts.sampling import Completion, Request, Sampling
from megatron_opd.contracts.stations import Engine, Probes
from megatron_opd.errors import RunError
from megatron_opd.weights.probes import project
from tests.unit.tiny_model_files import TOKENS, write_recipe


class Guesser:
    """Draws every token evenly, and keeps the weights it is given."""

    dtype = torch.float32
    max_sequence_length = 32

    def __init__(self) -> None:
        self.policy_version: int | None = None
        self.weights: dict[str, torch.Tensor] = {}

    def complete(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        if sampling.version != self.policy_version:
            raise RunError(f"the engine holds {self.policy_version}, not {sampling.version}")
        return [self._guess(request) for request in requests]

    def _guess(self, request: Request) -> Completion:
        random = np.random.default_rng(request.seed)
        ids = random.integers(len(TOKENS), size=request.max_tokens).tolist()
        return Completion(ids, [-math.log(len(TOKENS))] * len(ids), "length")

    def reload(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.policy_version = None
        self.weights = {name: tensor.clone() for name, tensor in named_tensors}

    def project(self, name: str, probes: Probes) -> list[torch.Tensor]:
        tensor = self.weights[name]
        return [project(probes, tensor.reshape(tensor.shape[0], -1))]

    def sleep(self) -> None: ...

    def restart(self) -> None: ...


@pytest.mark.parametrize("nproc", [1, 2])
def test_the_loop_runs_on_any_engine_that_keeps_the_contract(
    nproc: int, tmp_path: Path, run_distributed
) -> None:
    recipe = write_recipe(tmp_path, precision="float32", num_steps=3)
    for name in ("student", "teacher"):
        path = tmp_path / name / "model.safetensors"
        torch.manual_seed(len(name))
        tensors = {key: 0.1 * torch.randn(t.shape) for key, t in load_file(path).items()}
        save_file(tensors, path)
    run_distributed(__file__, nproc, recipe)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [row for row in map(json.loads, lines) if "train/loss" in row]
    assert len(steps) == 3
    assert all(row["train/grad_norm"] > 0 and row["refit/max_error"] == 0 for row in steps)
    after = load_file(tmp_path / "run" / "hf" / "model.safetensors")
    before = load_file(tmp_path / "student" / "model.safetensors")
    assert any(not torch.equal(after[name], before[name]) for name in before)


# ------------------------------------------------------------------------------------- the program
def main() -> int:
    from megatron_opd import start
    from megatron_opd.runs import run

    def open_guesser(*_: object) -> Engine:
        return Guesser()

    run.open_engine = open_guesser
    code, message = start.train(sys.argv[1])
    print(message)
    return code


if __name__ == "__main__":
    sys.exit(main())
