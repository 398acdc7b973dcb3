"""Two steps of real runs on a real language model, on two processes, and twenty word problems
before and after."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from ruamel.yaml import YAML

from megatron_opd.weights.hf import HfCheckpoint
from tests import forked
from tests.real.logits_worker import PRECISIONS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
PROBLEMS = Path(__file__).with_name("word_problems.jsonl")
TEMPLATE = "<|im_start|>user\n{problem} Answer in \\boxed{}.<|im_end|>\n<|im_start|>assistant\n"
# Tokens of a completion. A CPU without instructions for bfloat16 multiplies it seven times slower.
LONGEST = {"float32": 40, "bfloat16": 10}
# How far below the largest logit of transformers, in float32, a greedy token's may lie: what
# rounding is worth.
GAP = {"float32": 1e-3, "bfloat16": 0.5}
KL = {"float32": 1e-6, "bfloat16": 0.02}  # of the engine to the trainer


def run(
    directory: Path, model_dir: Path, precision: str, rollout: dict[str, int], **changes: Any
) -> list[dict[str, float]]:
    """Trains the model with itself as teacher; returns the metrics of both steps, and what follows
    the last."""
    recipe: dict[str, Any] = {
        "name": "real",
        "num_steps": 2,
        "max_sequence_length": 128,
        "precision": precision,
        "student": {"path": str(model_dir)},
        "teacher": {"path": str(model_dir)},
        "data": {
            "train": str(PROBLEMS),
            "heldout": str(PROBLEMS),
            "template": {"kind": "raw", "text": TEMPLATE},
        },
        "rollout": {"max_completion_tokens": LONGEST[precision], "kv_cache_gib": 0.25} | rollout,
        "train": {"optimizer": {"lr": 1e-5}},
        "checkpoint": {"every": 0},
        "run_dir": str(directory / "run"),
    }
    path = directory / "real.yaml"
    with path.open("w") as file:
        YAML(typ="safe", pure=True).dump(recipe | changes, file)
    done = forked.run("megatron_opd", 2, "train", path, timeout=800)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [
        json.loads(line) for line in (directory / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert len(rows) == 3
    return rows


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_model_learns_nothing_from_itself_and_answers_as_in_transformers(
    precision: str, model_dir: Path, tmp_path: Path
) -> None:
    """OPD with the student as teacher; word problems are evaluated before and after it."""
    two_samples = {"num_prompts": 2, "samples_per_prompt": 1}
    *steps, after = run(
        tmp_path, model_dir, precision, two_samples, method="opd", eval={"temperature": 0.0}
    )
    for step in steps:
        assert step["objective/distil/loss"] == 0
        assert step["train/grad_norm"] == 0
    assert_same_weights(model_dir, tmp_path / "run" / "hf", precision)
    before, again = (rows_of(tmp_path / "run" / "heldout" / f"step-00000{i}.jsonl") for i in (0, 2))
    assert len(before) == 20 and after["eval/accuracy"] == steps[0]["eval/accuracy"]
    assert [row["token_ids"] for row in before] == [row["token_ids"] for row in again]
    assert_greedy(model_dir, before[:10], GAP[precision])


def assert_greedy(model_dir: Path, rows: list[dict[str, Any]], gap: float) -> None:
    """Every token is transformers' choice, or has a logit there, in float32, less than `gap` below
    its choice's."""
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    for row in rows:
        ids_T = torch.tensor(row["token_ids"])
        context_1S = torch.cat([torch.tensor(row["prompt_token_ids"]), ids_T[:-1]])[None]
        with torch.no_grad():
            logits_TV = model(context_1S).logits[0, -len(ids_T) :]
        below_T = logits_TV.amax(-1) - logits_TV.gather(-1, ids_T[:, None])[:, 0]
        assert below_T.max() < gap


@pytest.mark.parametrize("precision", PRECISIONS)
def test_two_steps_of_tgpo(precision: str, model_dir: Path, tmp_path: Path) -> None:
    """The student in two stages, the teacher in two replicas; the engines follow the student."""
    one_group = {"num_prompts": 1, "samples_per_prompt": 2}
    student = {"path": str(model_dir), "layout": {"pipeline_model_parallel_size": 2}}
    *steps, _ = run(tmp_path, model_dir, precision, one_group, method="tgpo", student=student)
    for step in steps:
        assert 0 < step["train/grad_norm"] < 1 and step["mismatch/kl/mean"] < KL[precision]
    assert steps[1]["teacher/log_ratio/mean"] != 0  # the student has moved away from what it was
    assert len(rows_of(tmp_path / "run" / "rollouts" / "step-000001.jsonl")) == 2


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_same_weights(source: Path, exported: Path, precision: str) -> None:
    before, after = HfCheckpoint(source), HfCheckpoint(exported)
    for name in before.shapes:
        assert torch.equal(before.read(name).to(getattr(torch, precision)), after.read(name)), name
