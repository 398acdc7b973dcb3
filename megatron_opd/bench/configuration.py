"""The configuration of an evaluation: a recipe's, or made for a model directory by itself."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from megatron_opd.architectures.config import ModelConfig
from megatron_opd.checks.hub import local_model
from megatron_opd.checks.models import model_to_sample
from megatron_opd.errors import ConfigError, DataError
from megatron_opd.files.rows import BadRows
from megatron_opd.files.typed import build
from megatron_opd.recipe.data import TemplateConfig
from megatron_opd.recipe.keys import RunConfig
from megatron_opd.recipe.load import load_config
from megatron_opd.tasks.data import training_parts
from megatron_opd.tasks.data_files import data_files
from megatron_opd.tasks.examples import read_examples
from megatron_opd.tasks.tokenizer import tokenizer_for_checks

# What a model by itself is evaluated with. The keys that have no default train nothing here.
ALONE = {
    "name": "bench",
    "num_steps": 1,
    "max_sequence_length": 1,  # set when the prompts are known
    "method": {"name": "none", "terms": {"imitate": {"kind": "cross_entropy", "targets": "trace"}}},
    "train": {"optimizer": {"lr": 1.0}},
    "rollout": {"gpu_memory_utilization": 0.9, "kv_cache_gib": 4.0},
}


def configuration(
    recipe: str | None, overrides: Sequence[str], model: str | None, seed: int | None
) -> RunConfig:
    """The recipe whose student is the model to evaluate. Raises ConfigError."""
    if recipe is None:
        if model is None:
            raise ConfigError("--model: missing; give a Hugging Face directory, or a recipe")
        config = build(RunConfig, {**ALONE, "student": {"path": model}})
    else:
        config = load_config(recipe, overrides)
        if config.environment:
            raise ConfigError(
                "environment: suites ask questions, and this recipe plays; give --model alone"
            )
    path = local_model(model or config.student.path)
    student = ModelConfig(path) if recipe is None else replace(config.student, path=path)
    student = model_to_sample(student)
    if recipe is None and not tokenizer_for_checks(path).chat_template:
        # a base model reads a question as it stands
        template = TemplateConfig(kind="raw")
        config = replace(config, data=replace(config.data, template=template))
    return replace(config, student=student, seed=config.seed if seed is None else seed)


def training_problems(config: RunConfig, warn: Callable[[str], None]) -> list[str] | None:
    """The problems of a recipe's training data; None, and a warning, where they are not here."""
    if not (config.data.train or config.data.parts):
        return None
    try:
        problems = []
        for part in training_parts(config.data).values():
            files = data_files(part.paths, part.key)
            examples = read_examples(
                files, part.columns, part.key, BadRows("drop"), need_answer=False, need_trace=False
            )
            problems += [example.problem.text for example in examples]
        return problems
    except (ConfigError, DataError) as error:
        warn(f"no question is looked for in the training data: {error}")
        return None
