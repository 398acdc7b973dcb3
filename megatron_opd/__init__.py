"""On-policy distillation of language models on Megatron-Core.

    import megatron_opd

    config = megatron_opd.load_recipe("demo", "num_steps=20")
    megatron_opd.train("demo", "num_steps=20", nproc=2)
    accuracy = megatron_opd.evaluate("demo", model="runs/demo/hf")["eval/accuracy"]
    megatron_opd.convert("runs/demo/checkpoints/step-000020", "demo-hf")
    plan = megatron_opd.plan("tgpo_qwen25_math_7b", gpus=8, gpu="a100")

A recipe is a YAML file, the name of one in recipes/, or a run directory; overrides are KEY=VALUE,
as on the command line. Every function raises `errors.OpdError`, whose message names the cause and
the remedy, where a command would end with that line.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"
__all__ = ["convert", "evaluate", "load_recipe", "plan", "train"]

if TYPE_CHECKING:  # importing the package stays quick
    from megatron_opd.recipe.keys import RunConfig


def load_recipe(recipe: str | Path, *overrides: str) -> "RunConfig":
    """The recipe with its overrides as frozen dataclasses, every key checked."""
    from megatron_opd.recipe.load import load_config

    return load_config(str(recipe), overrides)


def train(
    recipe: str | Path, *overrides: str, nproc: int | None = None, resume: bool = False
) -> Path:
    """Trains in `nproc` processes (1: in this one). Returns the run's directory."""
    from megatron_opd import start
    from megatron_opd.world.worker import prepare_process, raise_outcome

    prepare_process()
    config = start.recipe_to_train(str(recipe), overrides, resume=resume)
    raise_outcome(*start.run(config, [str(recipe), *overrides], nproc=nproc, resume=resume))
    return Path(config.directory)


def evaluate(
    recipe: str | Path, *overrides: str, model: str | Path | None = None
) -> dict[str, float]:
    """The held-out metrics of a model directory, or of the recipe's student, in this process."""
    from megatron_opd.checks.models import model_to_evaluate
    from megatron_opd.world.worker import prepare_process

    config = load_recipe(recipe, *overrides)
    evaluated = model_to_evaluate(config, model)
    prepare_process()
    from megatron_opd.evaluation.heldout import evaluate_model  # imports vLLM

    return evaluate_model(config, evaluated)


def convert(
    source: str | Path, out: str | Path, *, dtype: str | None = None, nproc: int = 1
) -> Path:
    """Turns a Hugging Face directory into a Megatron checkpoint, or back. Returns `out`.

    `dtype`: "float32", "bfloat16", "float16", or None for the weights' own.
    """
    from megatron_opd.checks.hub import local_model
    from megatron_opd.conversion import convert

    return convert.convert(local_model(str(source)), str(out), dtype=dtype, nproc=nproc)


def plan(
    recipe: str | Path, *overrides: str, gpus: int, gpu: str = "a100", gpus_per_node: int = 8
) -> dict[str, Any]:
    """Memory and time of the recipe on a cluster, of its own layout and of others, as `plan --json`
    writes them."""
    from megatron_opd.world.worker import prepare_process

    prepare_process()
    from megatron_opd.planning.plan import make_plan

    return make_plan(
        load_recipe(recipe, *overrides), gpus=gpus, gpu=gpu, gpus_per_node=gpus_per_node
    ).as_json()
