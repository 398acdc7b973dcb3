"""The command line. Heavy imports happen inside the commands that need them."""

import argparse
import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_opd import __version__
from megatron_opd.errors import ConfigError, Interrupted, OpdError

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
  megatron-opd report runs/demo
  megatron-opd plan tgpo_qwen25_math_7b --gpus 8 --gpu a100

RECIPE is a YAML file, the name of one in recipes/, or a run directory. KEY=VALUE sets a key of it (docs/config.md).
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command. Returns the exit code: 0, 1 (failed), 2 (bad input) or 130 (interrupted)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    _quieten_dependencies()
    try:
        arguments = _parse(argv)
        code, message = arguments.command(arguments) or 0, ""
    except OpdError as error:
        code, message = error.exit_code, " ".join(str(error).split())
    except KeyboardInterrupt:
        code, message = Interrupted.exit_code, "interrupted"
    return _finish(code, message)


def _quieten_dependencies() -> None:
    """What packages say about each other's interfaces; `doctor` says what is missing and what that costs."""
    warnings.filterwarnings("ignore", category=SyntaxWarning)
    for package in ("megatron", "torch"):
        warnings.filterwarnings("ignore", module=rf"{package}\b")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # that there is no CUDA
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def _finish(code: int, message: str) -> int:
    from megatron_opd import launch

    if launch.is_worker():
        return launch.record_outcome(code, message)  # the starting process prints it, once
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0 or code == OpdError.exit_code:  # bad input and a stop are the same on every rank
        _say(code, f"rank {rank}: {message}" if rank else message)
    return code


def _say(code: int, message: str) -> None:
    if code and message:
        kind = "" if code == Interrupted.exit_code else "error: "
        print(f"megatron-opd: {kind}{message}", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------ arguments
def _parse(argv: list[str]) -> argparse.Namespace:
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    # argparse stops collecting KEY=VALUE at the first option between them.
    if rest and (any(each.startswith("-") for each in rest) or not hasattr(arguments, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides = arguments.overrides + rest
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megatron-opd",
        description="On-policy distillation: Megatron-Core teacher and student, vLLM rollouts.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"megatron-opd {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        sub.set_defaults(command=run)
        return sub

    def recipe_command(name: str, run: Any, text: str, *, optional: bool = False) -> argparse.ArgumentParser:
        sub = command(name, run, text)
        sub.add_argument(
            "recipe", metavar="RECIPE", nargs="?" if optional else None, help="file, name or run directory"
        )
        sub.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="set a key, such as rollout.num_prompts=8")
        return sub

    command("recipes", _recipes, "list the recipes")
    recipe_command("show", _show, "print the resolved recipe")
    check = recipe_command("check", _check, "check a recipe, its models and its data without running anything")
    check.add_argument("--nproc", metavar="N", type=_positive, help="number of processes of the run to check for")
    train = recipe_command("train", _train, "run a recipe")
    train.add_argument("--nproc", metavar="N", type=_positive, help="start N processes with torchrun")
    train.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of the run")
    planned = recipe_command("plan", _plan, "say how a recipe fits a cluster, and which layouts would")
    planned.add_argument("--gpus", metavar="N", type=_positive, required=True, help="devices, of all nodes")
    planned.add_argument("--gpu", metavar="GPU", required=True, help="a100, h800, h100 (80 GB, SXM) or cpu")
    planned.add_argument("--gpus-per-node", metavar="N", type=_positive, default=8, help="default 8")
    planned.add_argument("--json", metavar="FILE", type=Path, help="write everything there too")
    evaluate = recipe_command("eval", _eval, "measure a model's accuracy on a recipe's held-out prompts")
    evaluate.add_argument("--model", metavar="DIR", help="Hugging Face directory; default: the recipe's student")
    convert = command("convert", _convert, "write a checkpoint as a Hugging Face directory")
    convert.add_argument("checkpoint", metavar="CHECKPOINT", help="RUN/checkpoints/step-NNNNNN")
    convert.add_argument("out", metavar="OUT", help="a new directory")
    traces = recipe_command("traces", _traces, "sample a model's right responses to a recipe's prompts, as traces")
    traces.add_argument("--out", metavar="FILE", type=Path, required=True, help="a new .parquet file")
    traces.add_argument("--model", metavar="DIR", help="Hugging Face directory; default: the recipe's teacher")
    traces.add_argument("--samples", metavar="N", type=_positive, default=4, help="at most N per prompt; default 4")
    traces.add_argument("--temperature", metavar="T", type=float, default=1.0, help="0: greedy; default 1")
    report = command("report", _report, "write report.html and the plots of a run")
    report.add_argument("run_dir", metavar="RUN_DIR", type=Path)
    recipe_command("doctor", _doctor, "say what is installed, what is missing, and what that costs", optional=True)
    return parser


def _positive(text: str) -> int:
    number = int(text) if text.isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return number


# ------------------------------------------------------------------------------------------------ commands
def _recipes(arguments: argparse.Namespace) -> None:
    from megatron_opd.config.load import describe_recipe, recipe_files

    rows = [("RECIPE", "METHOD", "")] + [(name, *describe_recipe(path)) for name, path in recipe_files().items()]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for name, method, text in rows:
        print(f"{name:{widths[0]}}  {method:{widths[1]}}  {text}".rstrip())


def _show(arguments: argparse.Namespace) -> None:
    from megatron_opd.config.load import dump_config, load_config

    print(dump_config(load_config(arguments.recipe, arguments.overrides)), end="")


def _check(arguments: argparse.Namespace) -> None:
    from megatron_opd.config.check import check_run_directory, processes_needed
    from megatron_opd.config.load import load_config
    from megatron_opd.preflight import check_recipe

    config = load_config(arguments.recipe, arguments.overrides)
    _warn(check_recipe(config, world_size=arguments.nproc))
    is_run = (Path(config.directory) / "config.yaml").is_file()
    check_run_directory(config, resume=is_run)
    needed, then = processes_needed(config), " (a run: --resume)" if is_run else ""
    print(f"OK: {config.name}: {config.method.name}, --nproc {needed} or a multiple, into {config.directory}{then}")


def _plan(arguments: argparse.Namespace) -> int:
    from megatron_opd.config.load import load_config
    from megatron_opd.planning.run import run

    return run(
        load_config(arguments.recipe, arguments.overrides),
        gpus=arguments.gpus,
        gpu=arguments.gpu,
        gpus_per_node=arguments.gpus_per_node,
        out=arguments.json,
    )


def _train(arguments: argparse.Namespace) -> int:
    from megatron_opd import launch
    from megatron_opd.preflight import check_data

    config = _config_to_train(arguments)
    if launch.is_worker():
        launch.die_with_parent(signal.SIGKILL)
    launched = "WORLD_SIZE" in os.environ
    nproc = int(os.environ["WORLD_SIZE"]) if launched else arguments.nproc or 1
    if launched and arguments.nproc not in (None, nproc):
        raise ConfigError(f"--nproc: torchrun has started {nproc} processes already; leave it out")
    if not os.environ.get(launch.PREFLIGHT_DONE):
        _preflight(config, nproc, resume=arguments.resume)
        _warn(check_data(config))
    if nproc > 1 and not launched:
        return _launch(nproc, arguments)
    from megatron_opd.loop import train

    train(config, resume=arguments.resume)
    return 0


def _config_to_train(arguments: argparse.Namespace) -> Any:
    from megatron_opd.config.load import load_config

    config = load_config(arguments.recipe, arguments.overrides)
    given = Path(arguments.recipe)
    if arguments.resume and given.is_dir():  # the run may have been moved since it wrote its config.yaml
        config = replace(config, run_dir=str(given))
    return config


def _preflight(config: Any, nproc: int, *, resume: bool) -> None:
    from megatron_opd.config.check import check_run_directory, preflight
    from megatron_opd.preflight import check_resumed

    _warn(preflight(config, world_size=nproc))
    if resume:
        check_resumed(config)
    elif int(os.environ.get("RANK", "0")) == 0:  # another rank may look after rank 0 has made the directory
        check_run_directory(config, resume=False)


def _launch(nproc: int, arguments: argparse.Namespace) -> int:
    from megatron_opd.launch import run_workers

    resume = ["--resume"] if arguments.resume else []
    code, message = run_workers(nproc, ["-m", "megatron_opd", "train", arguments.recipe, *arguments.overrides, *resume])
    _say(code, message)
    return code


def _eval(arguments: argparse.Namespace) -> None:
    from megatron_opd.config.load import load_config

    config = load_config(arguments.recipe, arguments.overrides)
    if config.data.heldout is None:
        raise ConfigError("data.heldout: missing; eval measures on held-out prompts, give data.heldout=FILE")
    model = _model_to_sample(arguments.model, config.student)
    from megatron_opd.evaluate import run

    run(config, model)


def _model_to_sample(directory: str | None, otherwise: Any) -> Any:
    """The model that --model names, as it is on disk, or the recipe's. Raises DataError where it is not whole."""
    from megatron_opd.config.architecture import architecture_of
    from megatron_opd.config.model_files import check_weights
    from megatron_opd.config.schema import ModelConfig

    model = ModelConfig(directory) if directory else otherwise
    architecture_of(model)
    check_weights(Path(model.path))
    return model


def _convert(arguments: argparse.Namespace) -> None:
    from megatron_opd.convert import run

    run(arguments.checkpoint, arguments.out)


def _traces(arguments: argparse.Namespace) -> None:
    from megatron_opd.config.load import load_config

    config = load_config(arguments.recipe, arguments.overrides)
    if not arguments.model and not config.teacher:
        raise ConfigError("--model: missing, and the recipe has no teacher; give the model that writes the traces")
    if not 0 <= arguments.temperature < float("inf"):
        raise ConfigError(f"--temperature: {arguments.temperature:g} must be 0 or more")
    model = _model_to_sample(arguments.model, config.teacher)
    from megatron_opd.traces import check_out, run

    check_out(arguments.out)
    run(config, model, arguments.out, samples=arguments.samples, temperature=arguments.temperature)


def _report(arguments: argparse.Namespace) -> None:
    from megatron_opd.metrics.report import write_report

    print(write_report(arguments.run_dir))


def _doctor(arguments: argparse.Namespace) -> int:
    from megatron_opd import doctor
    from megatron_opd.config.load import load_config

    return doctor.run(load_config(arguments.recipe, arguments.overrides) if arguments.recipe else None)


def _warn(warnings: list[str]) -> None:
    if os.environ.get("RANK", "0") == "0":
        for text in warnings:
            print(f"megatron-opd: warning: {text}", file=sys.stderr, flush=True)
