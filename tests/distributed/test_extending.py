"""The examples of docs/extending.md, read from the page and run."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ruamel.yaml import YAML
from safetensors.torch import load_file, save_file

from megatron_opd.architectures import architecture
from megatron_opd.architectures.config import LayoutConfig, ModelConfig
from tests import forked
from tests.unit.tiny_model_files import write_recipe

PAGE = Path(__file__).resolve().parents[2] / "docs" / "extending.md"
BLOCK = re.compile(r"```(?:python|yaml)\n# ([^\n]+)\n(.*?)```", re.DOTALL)
EXAMPLES = dict(BLOCK.findall(PAGE.read_text()))
REPOSITORY = PAGE.parents[1]


def test_the_page_has_the_examples_that_are_run_here() -> None:
    assert set(EXAMPLES) == {
        "method.yaml",
        "own_parts.py",
        "method.yaml, with the gate",
        "own_reward.py",
        "own_engine.py",
        "architecture row",
        "own_environment.py",
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The user's: the modules of the page, tiny models, and a recipe."""
    folder = tmp_path_factory.mktemp("extending")
    for name, code in EXAMPLES.items():
        if name.endswith(".py"):
            (folder / name).write_text(code)
    write_recipe(folder, precision="float32", num_steps=2)
    for seed, name in enumerate(("student", "teacher")):
        path = folder / name / "model.safetensors"
        torch.manual_seed(seed)
        tensors = {key: 0.1 * torch.randn(t.shape) for key, t in load_file(path).items()}
        save_file(tensors, path)
    return folder


def command(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "megatron_opd", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def train(folder: Path, name: str, *overrides: str) -> list[dict[str, float]]:
    """The metrics of a run of the command line, in the user's folder."""
    recipe = next(folder.glob("*.yaml"))
    own = f"run_dir={name}", "rollout.engine=own_engine:Guesser"
    done = command(folder, "train", recipe.name, *own, *overrides)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "train/loss" in row]


def method(name: str) -> str:
    return "method=" + json.dumps(YAML(typ="safe").load(EXAMPLES[name]))


def test_a_method_trains_on_an_engine_of_ones_own(folder: Path) -> None:
    steps = train(folder, "method", method("method.yaml"))
    assert len(steps) == 2
    for step in steps:
        assert step["objective/advice/loss"] != 0  # no guess is right
        assert step["train/grad_norm"] > 0 and step["refit/max_error"] == 0


def test_a_gate_and_a_reward_of_ones_own_train_on_two_processes(folder: Path) -> None:
    reward = "reward.function=own_reward:share_of_digits"
    gate = method("method.yaml, with the gate")
    (step,) = train(folder, "gate", gate, reward, "num_steps=1", "--nproc=2")
    assert 0 < step["objective/advice/gate"] < 1 and step["objective/advice/loss"] != 0
    assert step["train/grad_norm"] > 0 and step["refit/max_error"] == 0
    assert step["reward/reason/partly"] > 0 and 0 < step["reward/mean"] < 1


def test_an_environment_is_played(folder: Path) -> None:
    done = command(
        folder, "env", "check", "own_environment:Guess", "options.most=20", "--seconds=0.2"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "50 in train, 10 in heldout" in done.stdout and "won 100%" in done.stdout


def test_an_environment_is_trained_on(folder: Path) -> None:
    environment = {"kind": "own_environment:Guess", "dialogue": "own_environment:Terse"}
    environment |= {"options": {"most": 10}, "max_turns": 3, "invalid_penalty": 0.1}
    overrides = [f"environment={json.dumps(environment)}", "method=grpo", "teacher=null"]
    overrides += ["data.train=[]", "num_steps=1"]
    (step,) = train(folder, "environment", *overrides)
    assert step["refit/max_error"] == 0


def test_an_architecture_is_a_row(tmp_path: Path) -> None:
    """Seed-OSS's weights in Megatron give the logits of transformers."""
    done = forked.run(Path(__file__), 1, tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


# ------------------------------------------------------------------------------------- the program
def main(directory: Path) -> None:
    import transformers

    from megatron_opd.mcore import parallel as groups
    from megatron_opd.mcore.model import build_model
    from megatron_opd.weights.load import load_hf
    from megatron_opd.world import processes
    from tests.distributed.weights_worker import logits_BSV

    architecture.SUPPORTED |= ast.literal_eval(EXAMPLES["architecture row"])
    processes.start()
    torch.manual_seed(0)
    config = transformers.SeedOssConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        head_dim=8, tie_word_embeddings=False, attention_dropout=0.0, residual_dropout=0.0,
    )  # fmt: skip
    theirs = transformers.SeedOssForCausalLM(config).float().eval()
    theirs.save_pretrained(directory / "seed_oss")
    model = ModelConfig(str(directory / "seed_oss"))
    arch = architecture.architecture_of(model)
    parallel = groups.create(LayoutConfig())
    chunks = build_model(arch, parallel, precision="float32")
    load_hf(chunks, model.path, arch, parallel)
    tokens_BS = torch.randint(64, (1, 12))
    with torch.no_grad():
        want = theirs(tokens_BS).logits
        got = logits_BSV(chunks, arch, parallel, tokens_BS)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
