"""The Python functions of the package do what the commands do, and refuse in the same words."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import megatron_opd
from megatron_opd.architectures.architecture import read_architecture
from megatron_opd.cli import main as cli
from megatron_opd.errors import ConfigError, DataError
from megatron_opd.weights.table import hf_shapes, weight_table
from tests.unit.tiny_model_files import write_model, write_recipe


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return str(write_recipe(tmp_path))


def refused_by_the_command(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The command's message, without what the command line puts before it."""
    assert cli.main(arguments) == ConfigError.exit_code
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("megatron-opd: error: ")


def test_reading_a_recipe_loads_no_torch(recipe: str) -> None:
    program = f"""
import sys
import megatron_opd
assert "megatron_opd.recipe.keys" not in sys.modules
megatron_opd.load_recipe({recipe!r})
sys.exit({{"torch", "transformers", "vllm", "megatron.core"}} & set(sys.modules) or 0)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_recipe_with_overrides(recipe: str) -> None:
    assert megatron_opd.load_recipe(Path(recipe)).num_steps == 4
    config = megatron_opd.load_recipe(recipe, "num_steps=7", "method=grpo", "teacher=null")
    assert (config.name, config.num_steps, config.method.name) == ("tiny", 7, "grpo")
    with pytest.raises(
        ConfigError, match=r"rollout\.num_promts=3': unknown key; did you mean num_prompts\?"
    ):
        megatron_opd.load_recipe(recipe, "rollout.num_promts=3")


def test_a_plan_is_what_the_command_writes(recipe: str, tmp_path: Path) -> None:
    for gpus, override in ((2, "num_steps=4"), (1, "rollout.gpu_memory_utilization=0.99")):
        out = tmp_path / f"{gpus}.json"
        arguments = ["plan", recipe, override, "--gpus", str(gpus), "--gpu", "a100"]
        fits = cli.main([*arguments, "--json", str(out)]) == 0
        plan = megatron_opd.plan(recipe, override, gpus=gpus)
        assert plan == json.loads(out.read_text())
        assert (plan["own"]["fits"], plan["gpus"]) == (fits, gpus)


def test_a_model_is_converted_there_and_back(tmp_path: Path) -> None:
    source = write_model(tmp_path / "hf")
    file = source / "model.safetensors"
    shapes = hf_shapes(weight_table(read_architecture(source)))
    random = np.random.default_rng(0)
    weights = {name: random.random(shape, np.float32) for name, shape in shapes.items()}
    save_file(weights, file)
    there = megatron_opd.convert(source, tmp_path / "megatron")
    assert there == tmp_path / "megatron" and list(there.glob("model/*.distcp"))
    back = megatron_opd.convert(there, tmp_path / "back")
    converted = load_file(back / file.name)
    assert {name: array.tobytes() for name, array in converted.items()} == {
        name: array.tobytes() for name, array in weights.items()
    }
    assert (back / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    with pytest.raises(DataError, match="already exists and is not overwritten"):
        megatron_opd.convert(source, back)


BAD_RUNS = {
    "num_steps=0": {},
    "student.path=/nowhere": {},
    "name=tiny": {"nproc": 3},
    "seed=5": {"resume": True},
    "data.train=/nowhere.jsonl": {"nproc": 2},
}


@pytest.mark.parametrize("override", BAD_RUNS)
def test_training_refuses_what_the_command_refuses(
    override: str, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = BAD_RUNS[override]
    flags = ["--resume"] if settings.get("resume") else []
    flags += ["--nproc", str(settings["nproc"])] if "nproc" in settings else []
    message = refused_by_the_command(capsys, "train", recipe, override, *flags)
    with pytest.raises((ConfigError, DataError)) as error:
        megatron_opd.train(recipe, override, **settings)
    assert message == " ".join(str(error.value).split())
    assert not Path(megatron_opd.load_recipe(recipe).directory).exists()


def test_an_evaluation_without_prompts_is_refused(
    recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused_by_the_command(capsys, "eval", recipe)
    with pytest.raises(ConfigError) as error:
        megatron_opd.evaluate(recipe)
    assert message == str(error.value)
    assert message.startswith("data.heldout: missing")
