"""What each command of the command line does, from its arguments. Heavy imports happen inside."""

import argparse
import contextlib
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_opd.errors import ConfigError, Interrupted


def recipes(arguments: argparse.Namespace) -> None:
    from megatron_opd.recipe.load import describe_recipe, recipe_files

    rows = [("RECIPE", "METHOD", "")] + [(name, *describe_recipe(path)) for name, path in recipe_files().items()]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for name, method, text in rows:
        print(f"{name:{widths[0]}}  {method:{widths[1]}}  {text}".rstrip())


def show(arguments: argparse.Namespace) -> None:
    from megatron_opd.recipe.load import dump_config, load_config

    print(dump_config(load_config(arguments.recipe, arguments.overrides)), end="")


def check(arguments: argparse.Namespace) -> None:
    from megatron_opd.checks.recipe import check_run_directory
    from megatron_opd.checks.sizes import processes_shared
    from megatron_opd.checks.training import check_recipe
    from megatron_opd.recipe.load import load_config

    config = load_config(arguments.recipe, arguments.overrides)
    _warn(check_recipe(config, world_size=arguments.nproc))
    is_run = (Path(config.directory) / "config.yaml").is_file()
    check_run_directory(config, resume=is_run)
    needed, then = f"{processes_shared(config)} or a multiple", " (a run: --resume)" if is_run else ""
    needed += "".join(f" plus {size} for the {role}" for role, size in config.processes_apart.items())
    print(f"OK: {config.name}: {config.method.name}, --nproc {needed}, into {config.directory}{then}")


def plan(arguments: argparse.Namespace) -> int:
    from megatron_opd.planning.plan import print_plan
    from megatron_opd.recipe.load import load_config

    return print_plan(
        load_config(arguments.recipe, arguments.overrides),
        gpus=arguments.gpus,
        gpu=arguments.gpu,
        gpus_per_node=arguments.gpus_per_node,
        out=arguments.json,
    )


def train(arguments: argparse.Namespace) -> int:
    from megatron_opd.checks.recipe import check_run_directory
    from megatron_opd.checks.training import check_data
    from megatron_opd.runs import lock
    from megatron_opd.world import torchrun

    config = _config_to_train(arguments)
    if torchrun.is_worker():
        torchrun.die_with_parent(signal.SIGKILL)
    launched = "WORLD_SIZE" in os.environ
    nproc = int(os.environ["WORLD_SIZE"]) if launched else arguments.nproc or 1
    if launched and arguments.nproc not in (None, nproc):
        raise ConfigError(f"--nproc: torchrun has started {nproc} processes already; leave it out")
    if not os.environ.get(torchrun.PREFLIGHT_DONE):
        _preflight(config, nproc, resume=arguments.resume)
        _warn(check_data(config))
    alone = lock.held(Path(config.directory)) if _is_first() else contextlib.nullcontext()
    if nproc > 1 and not launched:
        with alone:  # refused before processes are started; rank 0 then takes it for as long as they run
            pass
        return _launch(nproc, arguments)
    with alone:
        if _is_first():
            check_run_directory(config, resume=arguments.resume)  # another may have worked there until now
        from megatron_opd.loop import train

        train(config, resume=arguments.resume)
    return 0


def _config_to_train(arguments: argparse.Namespace) -> Any:
    from megatron_opd.checks.hub import with_local_models
    from megatron_opd.recipe.load import load_config
    from megatron_opd.tasks.pin import keep_pins

    config = with_local_models(load_config(arguments.recipe, arguments.overrides))
    given = Path(arguments.recipe)
    if arguments.resume and given.is_dir():  # the run may have been moved since it wrote its config.yaml
        config = replace(config, run_dir=str(given))
    stored = Path(config.directory) / "config.yaml"
    if arguments.resume and stored.is_file():
        config = keep_pins(config, load_config(str(stored)))
    return config


def _preflight(config: Any, nproc: int, *, resume: bool) -> None:
    from megatron_opd.checks.recipe import check_run_directory, preflight
    from megatron_opd.checks.training import check_resumed

    _warn(preflight(config, world_size=nproc))
    if resume:
        check_resumed(config)
    elif _is_first():  # another rank may look after rank 0 has made the directory
        check_run_directory(config, resume=False)


def _launch(nproc: int, arguments: argparse.Namespace) -> int:
    from megatron_opd.world.torchrun import run_workers

    resume = ["--resume"] if arguments.resume else []
    code, message = run_workers(nproc, ["-m", "megatron_opd", "train", arguments.recipe, *arguments.overrides, *resume])
    say(code, message)
    return code


def evaluate(arguments: argparse.Namespace) -> None:
    from megatron_opd.recipe.load import load_config

    config = load_config(arguments.recipe, arguments.overrides)
    if config.data.heldout is None:
        raise ConfigError("data.heldout: missing; eval measures on held-out prompts, give data.heldout=FILE")
    model = _model_to_sample(arguments.model, config.student)
    from megatron_opd.evaluation.heldout import evaluate_model

    evaluate_model(config, model)


def _model_to_sample(directory: str | None, otherwise: Any) -> Any:
    """The model that --model names, as it is on disk, or the recipe's. Raises DataError where it is not whole."""
    from megatron_opd.architectures.architecture import architecture_of
    from megatron_opd.architectures.config import ModelConfig
    from megatron_opd.checks.hub import local_model
    from megatron_opd.weights.check import check_weights

    model = ModelConfig(directory) if directory else otherwise
    model = replace(model, path=local_model(model.path))
    check_weights(Path(model.path), architecture_of(model), sampled=True)
    return model


def convert(arguments: argparse.Namespace) -> None:
    from megatron_opd.checks.hub import local_model
    from megatron_opd.conversion import convert
    from megatron_opd.world import torchrun

    if torchrun.is_worker():
        torchrun.die_with_parent(signal.SIGKILL)
        convert.work(arguments.source, arguments.out, dtype=arguments.dtype)
        return
    if "WORLD_SIZE" in os.environ:
        raise ConfigError("--nproc: convert starts its processes itself; give --nproc N and leave out torchrun")
    convert.convert(local_model(arguments.source), arguments.out, dtype=arguments.dtype, nproc=arguments.nproc)


def traces(arguments: argparse.Namespace) -> None:
    from megatron_opd.checks.hub import with_local_models
    from megatron_opd.recipe.load import load_config

    config = load_config(arguments.recipe, arguments.overrides)
    if not arguments.model and not config.teacher:
        raise ConfigError("--model: missing, and the recipe has no teacher; give the model that writes the traces")
    if arguments.temperature != 0 and not 0.01 <= arguments.temperature <= 2:
        raise ConfigError(f"--temperature: {arguments.temperature:g} must be 0 (greedy), or from 0.01 to 2")
    config = with_local_models(config)
    model = _model_to_sample(arguments.model, config.teacher)
    from megatron_opd.evaluation.traces import check_out, write_traces

    check_out(arguments.out)
    settings = {"samples": arguments.samples, "temperature": arguments.temperature}
    write_traces(config, model, arguments.out, verified=not arguments.unverified, **settings)


def launch(arguments: argparse.Namespace) -> int:
    from megatron_opd.cluster.submit import launch

    settings = {"dry_run": arguments.dry_run, "prepare": arguments.prepare}
    return launch(arguments.recipe, arguments.cluster, arguments.overrides, **settings)


def status(arguments: argparse.Namespace) -> int:
    from megatron_opd.cluster.watch import status

    return status(arguments.run_dir)


def logs(arguments: argparse.Namespace) -> int:
    from megatron_opd.cluster.watch import logs

    return logs(arguments.run_dir, follow=arguments.follow)


def cancel(arguments: argparse.Namespace) -> int:
    from megatron_opd.cluster.watch import cancel

    return cancel(arguments.run_dir)


def report(arguments: argparse.Namespace) -> None:
    from megatron_opd.report.page import write_report

    print(write_report(arguments.run_dir))


def doctor(arguments: argparse.Namespace) -> int:
    from megatron_opd.checks.hub import with_local_models
    from megatron_opd.doctor.report import print_report
    from megatron_opd.recipe.load import load_config

    if arguments.nproc and not arguments.recipe:
        raise ConfigError("--nproc: no effect without a recipe; name one")
    config = load_config(arguments.recipe, arguments.overrides) if arguments.recipe else None
    return print_report(config and with_local_models(config), arguments.nproc)


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _warn(warnings: list[str]) -> None:
    if _is_first():
        for text in warnings:
            print(f"megatron-opd: warning: {text}", file=sys.stderr, flush=True)


def say(code: int, message: str) -> None:
    """One line for the user, where there is something to say."""
    if code and message:
        kind = "" if code == Interrupted.exit_code else "error: "
        print(f"megatron-opd: {kind}{message}", file=sys.stderr, flush=True)
