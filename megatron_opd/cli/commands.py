"""The commands of the command line, each from its arguments. Heavy imports happen inside."""

import argparse
import json
import os
import signal
from pathlib import Path

from megatron_opd.errors import ConfigError
from megatron_opd.start import warn
from megatron_opd.world.worker import say


def recipes(arguments: argparse.Namespace) -> None:
    from megatron_opd.recipe.load import describe_recipe, recipe_files

    rows = [("RECIPE", "METHOD", "")]
    for name, path in recipe_files().items():
        rows.append((name, *describe_recipe(path)))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for name, method, text in rows:
        print(f"{name:{widths[0]}}  {method:{widths[1]}}  {text}".rstrip())


def show(arguments: argparse.Namespace) -> None:
    from megatron_opd.recipe.load import dump_config, load_config

    print(dump_config(load_config(arguments.recipe, arguments.overrides)), end="")


def check(arguments: argparse.Namespace) -> None:
    from megatron_opd.checks.processes import processes_shared
    from megatron_opd.checks.recipe import check_run_directory
    from megatron_opd.checks.training import check_recipe
    from megatron_opd.recipe.load import load_config

    config = load_config(arguments.recipe, arguments.overrides)
    warn(check_recipe(config, world_size=arguments.nproc))
    is_run = (Path(config.directory) / "config.yaml").is_file()
    check_run_directory(config, resume=is_run)
    note = " (a run: --resume)" if is_run else ""
    needed = f"{processes_shared(config)} or a multiple"
    for role, size in config.processes_apart.items():
        needed += f" plus {size} for the {role}"
    print(
        f"OK: {config.name}: {config.method.name}, --nproc {needed}, into {config.directory}{note}"
    )


def plan(arguments: argparse.Namespace) -> int:
    from megatron_opd.planning.plan import make_plan
    from megatron_opd.recipe.load import load_config

    out = arguments.json
    if out is not None and not out.parent.is_dir():
        raise ConfigError(f"--json: {out.parent} is no directory; make it first")
    config = load_config(arguments.recipe, arguments.overrides)
    plan = make_plan(
        config, gpus=arguments.gpus, gpu=arguments.gpu, gpus_per_node=arguments.gpus_per_node
    )
    plan.show()
    if out is not None:
        out.write_text(json.dumps(plan.as_json(), indent=1) + "\n")
    return 0 if plan.fits else 1


def train(arguments: argparse.Namespace) -> int:
    from megatron_opd.start import train

    code, message = train(
        arguments.recipe, arguments.overrides, resume=arguments.resume, nproc=arguments.nproc
    )
    say(code, message)
    return code


def evaluate(arguments: argparse.Namespace) -> None:
    from megatron_opd.checks.models import model_to_evaluate
    from megatron_opd.recipe.load import load_config

    config = load_config(arguments.recipe, arguments.overrides)
    model = model_to_evaluate(config, arguments.model)
    from megatron_opd.evaluation.heldout import evaluate_model

    evaluate_model(config, model)


def convert(arguments: argparse.Namespace) -> None:
    from megatron_opd.checks.hub import local_model
    from megatron_opd.conversion import convert
    from megatron_opd.world import torchrun

    if torchrun.is_worker():
        torchrun.die_with_parent(signal.SIGKILL)
        convert.work(arguments.source, arguments.out, dtype=arguments.dtype)
        return
    if "WORLD_SIZE" in os.environ:
        raise ConfigError(
            "--nproc: convert starts its processes itself; give --nproc N and leave out torchrun"
        )
    convert.convert(
        local_model(arguments.source), arguments.out, dtype=arguments.dtype, nproc=arguments.nproc
    )


def traces(arguments: argparse.Namespace) -> None:
    from megatron_opd.architectures.config import ModelConfig
    from megatron_opd.checks.hub import with_local_models
    from megatron_opd.checks.models import model_to_sample
    from megatron_opd.recipe.load import load_config

    config = load_config(arguments.recipe, arguments.overrides)
    if config.environment:
        raise ConfigError(
            "environment: traces answer the prompts of data, and this recipe has none; give a "
            "recipe with data.train"
        )
    model = ModelConfig(arguments.model) if arguments.model else config.teacher
    if model is None:
        raise ConfigError(
            "--model: missing, and the recipe has no teacher; give the model that writes the traces"
        )
    if arguments.temperature != 0 and not 0.01 <= arguments.temperature <= 2:
        raise ConfigError(
            f"--temperature: {arguments.temperature:g} must be 0 (greedy), or from 0.01 to 2"
        )
    config = with_local_models(config)
    model = model_to_sample(model)
    from megatron_opd.evaluation.traces import check_out, write_traces

    check_out(arguments.out)
    write_traces(
        config,
        model,
        arguments.out,
        samples=arguments.samples,
        temperature=arguments.temperature,
        keep=arguments.keep,
        verified=not arguments.unverified,
    )


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
    if len(arguments.run_dirs) == 1:
        if arguments.out is not None:
            raise ConfigError("--out: belongs to a comparison; name several runs")
        return _report_of_one(arguments.run_dirs[0], watch=arguments.watch)
    if arguments.watch:
        raise ConfigError("--watch: shows one run; name one")
    from megatron_opd.report.comparison_page import write_comparison

    page, comparison = write_comparison(arguments.run_dirs, arguments.out)
    for against in comparison.against:
        print(against.sentence)
    for note in comparison.notes:
        print(note)
    print(page)


def _report_of_one(run_dir: Path, *, watch: bool) -> None:
    from megatron_opd.files.lock import in_use
    from megatron_opd.report.page import write_report
    from megatron_opd.report.watch import watch_run

    if watch:
        watch_run(run_dir)
    else:
        print(write_report(run_dir, running=in_use(run_dir) is True))


def skills(arguments: argparse.Namespace) -> int:
    from megatron_opd.checks.hub import with_local_models
    from megatron_opd.checks.skill_texts import describe_bank, describe_recipe, is_bank
    from megatron_opd.recipe.load import load_config

    fits = True
    if is_bank(arguments.recipe):
        if arguments.overrides:
            raise ConfigError(f"{arguments.overrides[0]}: no effect on a bank; name a recipe")
        lines = describe_bank(arguments.recipe)
    else:
        config = load_config(arguments.recipe, arguments.overrides)
        lines, fits = describe_recipe(with_local_models(config))
    print("\n".join(lines))
    return 0 if fits else 1


def env(arguments: argparse.Namespace) -> None:
    from megatron_opd.environments.trial import environment_of, try_environment

    if not 0 <= arguments.seconds <= 3600:
        raise ConfigError(f"--seconds: {arguments.seconds:g} must be from 0 to 3600")
    config = environment_of(arguments.environment, arguments.overrides)
    print("\n".join(try_environment(config, arguments.seconds)))


def doctor(arguments: argparse.Namespace) -> int:
    from megatron_opd.checks.hub import with_local_models
    from megatron_opd.doctor.report import print_report
    from megatron_opd.recipe.load import load_config

    if arguments.nproc and not arguments.recipe:
        raise ConfigError("--nproc: no effect without a recipe; name one")
    config = load_config(arguments.recipe, arguments.overrides) if arguments.recipe else None
    return print_report(config and with_local_models(config), arguments.nproc)
