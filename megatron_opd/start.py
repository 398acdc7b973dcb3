"""A training run from its recipe: every check, the processes it needs, and then the loop.

The command `train`, the Python function `megatron_opd.train` and the processes of a Slurm job all
begin here.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_opd.errors import ConfigError
from megatron_opd.recipe.keys import RunConfig
from megatron_opd.world import torchrun


def train(
    recipe: str, overrides: Sequence[str] = (), *, resume: bool = False, nproc: int | None = None
) -> tuple[int, str]:
    """Runs a recipe, as `run` does."""
    config = recipe_to_train(recipe, overrides, resume=resume)
    return run(config, [recipe, *overrides], resume=resume, nproc=nproc)


def run(
    config: RunConfig, words: Sequence[str], *, resume: bool = False, nproc: int | None = None
) -> tuple[int, str]:
    """Trains in this process, in `nproc` that it starts, or as one that torchrun has started.

    `config` is `recipe_to_train` of `words`, the recipe and its overrides. Returns the exit code
    and the message of the rank that failed first, (0, "") where none did. Raises OpdError in a
    process that trains.
    """
    from megatron_opd.checks.recipe import check_run_directory
    from megatron_opd.checks.training import check_data
    from megatron_opd.files import lock

    if torchrun.is_worker():
        torchrun.die_with_parent(signal.SIGKILL)
    launched = "WORLD_SIZE" in os.environ
    world_size = int(os.environ["WORLD_SIZE"]) if launched else nproc or 1
    if launched and nproc not in (None, world_size):
        raise ConfigError(
            f"--nproc: torchrun has started {world_size} processes already; leave it out"
        )
    if not os.environ.get(torchrun.PREFLIGHT_DONE):
        _preflight(config, world_size, resume=resume)
        warn(check_data(config))
    alone = lock.locked(Path(config.directory)) if _is_first() else contextlib.nullcontext()
    if world_size > 1 and not launched:
        # refused before processes are started; rank 0 then takes it for as long as they run
        with alone:
            pass
        flags = ["--resume"] if resume else []
        return torchrun.run_workers(world_size, ["-m", "megatron_opd", "train", *words, *flags])
    with alone:
        if _is_first():
            check_run_directory(config, resume=resume)  # another may have worked there until now
        from megatron_opd import loop

        loop.train(config, resume=resume)
    return 0, ""


def recipe_to_train(
    recipe: str, overrides: Sequence[str] = (), *, resume: bool = False
) -> RunConfig:
    """The recipe as a run trains it: with local copies of Hub models and a resumed run's pins."""
    from megatron_opd.checks.hub import with_local_models
    from megatron_opd.recipe.load import load_config

    if resume:
        return to_resume(load_run(recipe, overrides))
    return with_local_models(load_config(recipe, overrides))


def load_run(recipe: str, overrides: Sequence[str]) -> RunConfig:
    """The recipe, where a run directory is the run's own: it may have been moved since it wrote its
    config.yaml. Raises ConfigError."""
    from megatron_opd.recipe.load import load_config

    config = load_config(recipe, overrides)
    elsewhere = any(text.startswith("run_dir=") for text in overrides)
    return replace(config, run_dir=recipe) if Path(recipe).is_dir() and not elsewhere else config


def to_resume(config: RunConfig) -> RunConfig:
    """The recipe as its run goes on with it: with local copies of Hub models, and with what the
    run has pinned, where there is one."""
    from megatron_opd.checks.hub import with_local_models
    from megatron_opd.recipe.load import load_config
    from megatron_opd.tasks.pin import keep_pins

    config = with_local_models(config)
    stored = Path(config.directory) / "config.yaml"
    return keep_pins(config, load_config(str(stored))) if stored.is_file() else config


def warn(warnings: list[str]) -> None:
    """Prints a line for each warning, on rank 0's standard error."""
    if _is_first():
        for text in warnings:
            print(f"megatron-opd: warning: {text}", file=sys.stderr, flush=True)


def _preflight(config: RunConfig, world_size: int, *, resume: bool) -> None:
    from megatron_opd.checks.recipe import check_run_directory, preflight
    from megatron_opd.checks.training import check_resumed

    warn(preflight(config, world_size=world_size))
    if resume:
        check_resumed(config)
    elif _is_first():  # another rank may look after rank 0 has made the directory
        check_run_directory(config, resume=False)


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"
