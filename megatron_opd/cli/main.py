"""The command line. Heavy imports happen inside the commands that need them."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_opd import __version__
from megatron_opd.cli import commands
from megatron_opd.world.host import hide_gpus
from megatron_opd.world.worker import finish, outcome, quieten_dependencies

EXAMPLES = """\
examples:
  megatron-opd recipes
  megatron-opd show demo rollout.num_prompts=32
  megatron-opd check demo --nproc 2
  megatron-opd train demo --nproc 2 method=grpo run_dir=runs/demo_grpo
  megatron-opd train runs/demo --nproc 2 --resume num_steps=200
  torchrun --nproc-per-node 2 -m megatron_opd train demo
  megatron-opd eval demo --model runs/demo/hf
  megatron-opd traces demo --out runs/demo_traces.parquet
  megatron-opd convert runs/demo/checkpoints/step-000100 demo-hf
  megatron-opd report runs/demo
  megatron-opd launch demo --cluster cpu-test
  megatron-opd plan tgpo_qwen25_math_7b --gpus 8 --gpu a100

RECIPE is a YAML file, the name of one in recipes/, or a run directory. \
KEY=VALUE sets a key of it (docs/config.md).
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command. Returns the exit code: 0, 1 (failed), 2 (bad input) or 130 (interrupted)."""
    own_process = argv is None
    argv = list(sys.argv[1:] if argv is None else argv)
    quieten_dependencies()

    def run() -> int | None:
        if own_process:
            hide_gpus()
        arguments = _parse(argv)
        return arguments.command(arguments)

    return finish(*outcome(run))


# ---------------------------------------------------------------------------------------- arguments
def _parse(argv: list[str]) -> argparse.Namespace:
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
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        sub = subparsers.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        sub.set_defaults(command=run)
        return sub

    def recipe_command(
        name: str, run: Any, text: str, *, optional: bool = False
    ) -> argparse.ArgumentParser:
        sub = command(name, run, text)
        sub.add_argument(
            "recipe",
            metavar="RECIPE",
            nargs="?" if optional else None,
            help="file, name or run directory",
        )
        sub.add_argument(
            "overrides",
            metavar="KEY=VALUE",
            nargs="*",
            help="set a key, such as rollout.num_prompts=8",
        )
        return sub

    command("recipes", commands.recipes, "list the recipes")
    recipe_command("show", commands.show, "print the resolved recipe")
    check = recipe_command(
        "check", commands.check, "check a recipe, its models and its data without running anything"
    )
    check.add_argument(
        "--nproc", metavar="N", type=_positive, help="number of processes of the run to check for"
    )
    train = recipe_command("train", commands.train, "run a recipe")
    train.add_argument(
        "--nproc", metavar="N", type=_positive, help="start N processes with torchrun"
    )
    train.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint of the run"
    )
    planned = recipe_command(
        "plan", commands.plan, "say how a recipe fits a cluster, and which layouts would"
    )
    planned.add_argument(
        "--gpus", metavar="N", type=_positive, required=True, help="devices, of all nodes and roles"
    )
    planned.add_argument(
        "--gpu", metavar="GPU", required=True, help="a100, h800, h100 (80 GB, SXM) or cpu"
    )
    planned.add_argument(
        "--gpus-per-node", metavar="N", type=_positive, default=8, help="default 8"
    )
    planned.add_argument("--json", metavar="FILE", type=Path, help="write everything there too")
    evaluate = recipe_command(
        "eval", commands.evaluate, "measure a model's accuracy on a recipe's held-out prompts"
    )
    evaluate.add_argument(
        "--model", metavar="DIR", help="Hugging Face directory; default: the recipe's student"
    )
    convert = command(
        "convert",
        commands.convert,
        "turn a Hugging Face directory into a Megatron checkpoint, or back",
    )
    convert.add_argument(
        "source", metavar="SOURCE", help="Hugging Face directory, or RUN/checkpoints/step-NNNNNN"
    )
    convert.add_argument(
        "out", metavar="OUT", help="a new directory; left unfinished, the same command goes on"
    )
    convert.add_argument(
        "--dtype", choices=["bfloat16", "float16", "float32"], help="default: as it is stored"
    )
    convert.add_argument(
        "--nproc", metavar="N", type=_positive, default=1, help="share the files among N processes"
    )
    traces = recipe_command(
        "traces",
        commands.traces,
        "sample a model's right responses to a recipe's prompts, as traces",
    )
    traces.add_argument(
        "--out", metavar="FILE", type=Path, required=True, help="a new .parquet file"
    )
    traces.add_argument(
        "--model", metavar="DIR", help="Hugging Face directory; default: the recipe's teacher"
    )
    traces.add_argument(
        "--samples", metavar="N", type=_positive, default=4, help="at most N per prompt; default 4"
    )
    traces.add_argument(
        "--temperature", metavar="T", type=float, default=1.0, help="0: greedy; default 1"
    )
    traces.add_argument(
        "--unverified",
        action="store_true",
        help="right or wrong: no gold answers are needed, as TrOPD's prefixes",
    )
    launch = recipe_command(
        "launch", commands.launch, "submit a recipe to a Slurm cluster, through nemo-run"
    )
    launch.add_argument(
        "--cluster", metavar="PROFILE", required=True, help="file, or the name of one in slurm/"
    )
    launch.add_argument(
        "--dry-run", action="store_true", help="print the batch script and submit nothing"
    )
    launch.add_argument(
        "--prepare",
        action="store_true",
        help="write a batch script without nemo-run, to submit yourself",
    )
    for name, run, text in (
        ("status", commands.status, "say how a launched run is getting on"),
        ("logs", commands.logs, "print the logs of a launched run"),
        ("cancel", commands.cancel, "end the jobs of a launched run"),
    ):
        of_job = command(name, run, text)
        of_job.add_argument("run_dir", metavar="RUN_DIR", type=Path)
        if name == "logs":
            of_job.add_argument("--follow", action="store_true", help="until the job has ended")
    report = command("report", commands.report, "write report.html and the plots of a run")
    report.add_argument("run_dir", metavar="RUN_DIR", type=Path)
    doctor = recipe_command(
        "doctor",
        commands.doctor,
        "say what is installed, and whether a recipe computes what it should",
        optional=True,
    )
    doctor.add_argument(
        "--nproc", metavar="N", type=_positive, help="processes to check the recipe's layout on"
    )
    return parser


def _positive(text: str) -> int:
    number = int(text) if text.isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return number
