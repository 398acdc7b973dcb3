"""`megatron-opd init`: a first recipe from a few answers."""

import argparse

from megatron_opd.cli.adding import Commands, positive
from megatron_opd.errors import ConfigError
from megatron_opd.start import warn


def add(added: Commands) -> None:
    """Adds the command to the parser."""
    parser = added.add(
        "init", init, "write a first recipe for your models and data, with layouts that fit"
    )
    parser.add_argument("name", metavar="NAME", help="of the recipe: recipes/NAME.yaml")
    parser.add_argument("--student", metavar="DIR", help="the model to train")
    parser.add_argument("--teacher", metavar="DIR", help="the model to learn from; '': none")
    parser.add_argument("--data", metavar="FILE", help="prompts: .jsonl, .json or .parquet")
    parser.add_argument("--heldout", metavar="FILE", help="prompts to measure on; '': none")
    parser.add_argument("--gpus", metavar="N", type=positive, help="GPUs, or processes on a CPU")
    parser.add_argument("--gpu", metavar="GPU", help="a100, h800, h100 (80 GB, SXM) or cpu")
    parser.add_argument("--method", metavar="NAME", help="default: by what models and data allow")


def init(arguments: argparse.Namespace) -> int:
    """Writes the recipe. What is not given is asked, if there is a terminal."""
    from megatron_opd.checks.hub import parse_id
    from megatron_opd.checks.training import check_recipe
    from megatron_opd.drafting.answers import Answers, complete, recipe_file

    path = recipe_file(arguments.name)
    given = {key: getattr(arguments, key) for key in vars(Answers())}
    answers = complete(Answers(**given))
    from megatron_opd.drafting.draft import draft  # imports Megatron
    from megatron_opd.drafting.material import look

    material = look(answers)
    drafted = draft(arguments.name, answers, material)
    if not material.absent:
        warn(check_recipe(drafted.config, world_size=answers.gpus))
    try:
        path.parent.mkdir(exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(drafted.text)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from None
    drafted_for = f"{answers.gpus} x {answers.gpu}"
    layout = drafted.config.student.layout
    print(f"wrote {path}: {drafted.config.method.name} on {drafted_for}, the student as {layout}")
    for model in material.absent:
        remedy = (
            "`check` and `train` download it" if parse_id(model) else "bring it before you train"
        )
        print(f"{model} is not here, its sizes are from the table; {remedy}")
    print(f"  megatron-opd check {arguments.name} --nproc {answers.gpus}")
    print(f"  megatron-opd plan {arguments.name} --gpus {answers.gpus} --gpu {answers.gpu}")
    print(f"  megatron-opd train {arguments.name} --nproc {answers.gpus}")
    return 0
