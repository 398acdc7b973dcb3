"""The arguments of every command."""

import argparse
from pathlib import Path

from megatron_opd import __version__
from megatron_opd.cli import bench, commands, init
from megatron_opd.cli.adding import Commands, positive

EXAMPLES = """\
examples:
  megatron-opd recipes
  megatron-opd init mine --student models/STUDENT --teacher models/TEACHER --data mine.jsonl
  megatron-opd show demo rollout.num_prompts=32
  megatron-opd check demo --nproc 2
  megatron-opd train demo --nproc 2 method=grpo run_dir=runs/demo_grpo
  megatron-opd train runs/demo --nproc 2 --resume num_steps=200
  torchrun --nproc-per-node 2 -m megatron_opd train demo
  megatron-opd eval demo --model runs/demo/hf
  megatron-opd bench --model runs/demo/hf --suites aime24,math_500 --out runs/demo/bench
  megatron-opd traces demo --out runs/demo_traces.parquet
  megatron-opd convert runs/demo/checkpoints/step-000100 demo-hf
  megatron-opd report runs/demo
  megatron-opd report runs/demo --watch
  megatron-opd report runs/demo runs/demo_grpo --out runs/compared.html
  megatron-opd launch demo --cluster cpu-test
  megatron-opd skills check runs/skills
  megatron-opd env check workshop options.size=4
  megatron-opd plan tgpo_qwen25_math_7b --gpus 8 --gpu a100

RECIPE is a YAML file, the name of one in recipes/, or a run directory. \
KEY=VALUE sets a key of it (docs/config.md).
"""


def parse(argv: list[str]) -> argparse.Namespace:
    """Exits, as argparse does, where they are wrong."""
    parser = _parser()
    arguments, unparsed = parser.parse_known_args(argv)
    # argparse stops collecting KEY=VALUE at the first option between them.
    takes_keys = hasattr(arguments, "overrides")
    if unparsed and (not takes_keys or any(word.startswith("-") for word in unparsed)):
        parser.error(f"unrecognized arguments: {' '.join(unparsed)}")
    if unparsed:
        arguments.overrides = arguments.overrides + unparsed
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megatron-opd",
        description="On-policy distillation: Megatron-Core teacher and student, vLLM rollouts.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"megatron-opd {__version__}")
    added = Commands(parser.add_subparsers(title="commands", metavar="COMMAND", required=True))
    added.add("recipes", commands.recipes, "list the recipes")
    init.add(added)
    added.of_recipe("show", commands.show, "print the resolved recipe")
    for add in (
        _add_check,
        _add_train,
        _add_plan,
        _add_eval,
        bench.add,
        _add_convert,
        _add_traces,
        _add_launch,
        _add_status_logs_cancel,
        _add_report,
        _add_doctor,
        _add_skills,
        _add_env,
    ):
        add(added)
    return parser


def _add_check(added: Commands) -> None:
    parser = added.of_recipe(
        "check", commands.check, "check a recipe, its models and its data without running anything"
    )
    parser.add_argument(
        "--nproc", metavar="N", type=positive, help="number of processes of the run to check for"
    )


def _add_train(added: Commands) -> None:
    parser = added.of_recipe("train", commands.train, "run a recipe")
    parser.add_argument(
        "--nproc", metavar="N", type=positive, help="start N processes with torchrun"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint of the run"
    )


def _add_plan(added: Commands) -> None:
    parser = added.of_recipe(
        "plan", commands.plan, "say how a recipe fits a cluster, and which layouts would"
    )
    parser.add_argument(
        "--gpus", metavar="N", type=positive, required=True, help="devices, of all nodes and roles"
    )
    parser.add_argument(
        "--gpu", metavar="GPU", required=True, help="a100, h800, h100 (80 GB, SXM) or cpu"
    )
    parser.add_argument("--gpus-per-node", metavar="N", type=positive, default=8, help="default 8")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write everything there too")


def _add_eval(added: Commands) -> None:
    parser = added.of_recipe(
        "eval", commands.evaluate, "measure a model's accuracy on a recipe's held-out prompts"
    )
    parser.add_argument(
        "--model", metavar="DIR", help="Hugging Face directory; default: the recipe's student"
    )


def _add_convert(added: Commands) -> None:
    parser = added.add(
        "convert",
        commands.convert,
        "turn a Hugging Face directory into a Megatron checkpoint, or back",
    )
    parser.add_argument(
        "source", metavar="SOURCE", help="Hugging Face directory, or RUN/checkpoints/step-NNNNNN"
    )
    parser.add_argument(
        "out", metavar="OUT", help="a new directory; left unfinished, the same command goes on"
    )
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float16", "float32"], help="default: as it is stored"
    )
    parser.add_argument(
        "--nproc", metavar="N", type=positive, default=1, help="share the files among N processes"
    )


def _add_traces(added: Commands) -> None:
    parser = added.of_recipe(
        "traces",
        commands.traces,
        "sample a model's right responses to a recipe's prompts, as traces",
    )
    parser.add_argument(
        "--out", metavar="FILE", type=Path, required=True, help="a new .parquet file"
    )
    parser.add_argument(
        "--model", metavar="DIR", help="Hugging Face directory; default: the recipe's teacher"
    )
    parser.add_argument(
        "--samples", metavar="N", type=positive, default=4, help="at most N per prompt; default 4"
    )
    parser.add_argument(
        "--temperature", metavar="T", type=float, default=1.0, help="0: greedy; default 1"
    )
    parser.add_argument(
        "--keep",
        choices=["first", "shortest", "all"],
        default="first",
        help="of the right ones of a prompt; default first",
    )
    parser.add_argument(
        "--unverified",
        action="store_true",
        help="right or wrong: no gold answers are needed, as TrOPD's prefixes",
    )


def _add_launch(added: Commands) -> None:
    parser = added.of_recipe(
        "launch", commands.launch, "submit a recipe to a Slurm cluster, through nemo-run"
    )
    parser.add_argument(
        "--cluster", metavar="PROFILE", required=True, help="file, or the name of one in slurm/"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the batch script and submit nothing"
    )
    parser.add_argument(
        "--prepare",
        action="store_true",
        help="write a batch script without nemo-run, to submit yourself",
    )


def _add_status_logs_cancel(added: Commands) -> None:
    status = added.add("status", commands.status, "say how a launched run is getting on")
    logs = added.add("logs", commands.logs, "print the logs of a launched run")
    cancel = added.add("cancel", commands.cancel, "end the jobs of a launched run")
    for parser in (status, logs, cancel):
        parser.add_argument("run_dir", metavar="RUN_DIR", type=Path)
    logs.add_argument("--follow", action="store_true", help="until the job has ended")


def _add_report(added: Commands) -> None:
    parser = added.add(
        "report", commands.report, "write the page of a run, or one that compares several"
    )
    parser.add_argument("run_dirs", metavar="RUN_DIR", type=Path, nargs="+")
    parser.add_argument(
        "--out", metavar="FILE", type=Path, help="of a comparison; default: beside the first run"
    )
    parser.add_argument(
        "--watch",
        action="store_true",
        help="show the steps and write the page anew until it ends",
    )


def _add_doctor(added: Commands) -> None:
    parser = added.of_recipe(
        "doctor",
        commands.doctor,
        "say what is installed, and whether a recipe computes what it should",
        optional=True,
    )
    parser.add_argument(
        "--nproc", metavar="N", type=positive, help="processes to check the recipe's layout on"
    )


def _add_skills(added: Commands) -> None:
    parser = added.add(
        "skills", commands.skills, "say what tasks get from a bank of skills, and whether it fits"
    )
    parser.add_argument("action", choices=["check"], help="the only one")
    parser.add_argument(
        "recipe", metavar="RECIPE|BANK", help="a recipe with skills, or a bank by itself"
    )
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="set a key of the recipe")


def _add_env(added: Commands) -> None:
    parser = added.add(
        "env", commands.env, "play an environment by script, and say what it does and how quickly"
    )
    parser.add_argument("action", choices=["check"], help="the only one")
    parser.add_argument(
        "environment", metavar="KIND|RECIPE", help="a kind of environment, or a recipe that has one"
    )
    parser.add_argument(
        "overrides", metavar="KEY=VALUE", nargs="*", help="set a key of it, such as workers=4"
    )
    parser.add_argument(
        "--seconds", metavar="S", type=float, default=5.0, help="how long to play; default 5"
    )


def described_commands() -> dict[str, str]:
    """What every command does, by name, in the order of `--help`."""
    kind = argparse._SubParsersAction
    (subparsers,) = (each for each in _parser()._actions if isinstance(each, kind))
    return {name: parser.description for name, parser in subparsers.choices.items()}
