"""The loop runs on an engine that is not ours: 30 lines that keep the contract of a station."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_opd.contracts.rows import Episode, Row, Task
from megatron_opd.contracts.stations import Engine, Probes
from megatron_opd.errors import RunError
from megatron_opd.weights.probes import project
from tests.unit.tiny_model_files import TOKENS, write_recipe


class Guesser:
    """Draws every token evenly, and keeps the weights it is given."""

    dtype = torch.float32

    def __init__(self) -> None:
        self.policy_version: int | None = None
        self.weights: dict[str, torch.Tensor] = {}

    def generate(
        self, tasks: list[Task], *, version: int, step: int, seed: int, samples_per_prompt: int,
        max_completion_tokens: int, **settings: object,
    ) -> list[Row]:  # fmt: skip
        if version != self.policy_version:
            raise RunError(f"the engine holds version {self.policy_version}, not {version}")
        rows = []
        for task in tasks:
            for sample in range(samples_per_prompt):
                random = np.random.default_rng([seed, step, task.index, sample])
                ids_T = random.integers(len(TOKENS), size=max_completion_tokens, dtype=np.int32)
                logprobs_T = np.full(len(ids_T), -np.log(len(TOKENS)), np.float32)
                text = "".join(TOKENS[i] for i in ids_T)
                rows.append(
                    Row.of_student(
                        Episode(task, sample), ids_T, logprobs_T,
                        version=version, text=text, finish_reason="length",
                    )
                )  # fmt: skip
        return rows

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
        return Guesser()  # type: ignore[return-value]  # it takes further settings as they come

    run.open_engine = open_guesser
    code, message = start.train(sys.argv[1])
    print(message)
    return code


if __name__ == "__main__":
    sys.exit(main())
