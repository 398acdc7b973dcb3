"""`megatron-opd bench --lm-eval`: tasks of the Language Model Evaluation Harness."""

import argparse
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_opd.cli.adding import natural
from megatron_opd.errors import ConfigError

if TYPE_CHECKING:
    from megatron_opd.bench.harness import HarnessBench

SUITES_ALONE = ("suites", "data", "samples", "server", "json")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options to the command `bench`."""
    parser.add_argument(
        "--lm-eval",
        metavar="TASKS",
        action="append",
        help="no suites, but tasks of the package lm-eval by name or as YAML files, with its own "
        "prompts and metrics",
    )
    parser.add_argument(
        "--num-fewshot", metavar="N", type=natural, help="--lm-eval: examples before a question"
    )
    parser.add_argument(
        "--apply-chat-template",
        action="store_true",
        help="--lm-eval: ask in the model's chat template; as in lm-eval itself not the default",
    )


def check_options(arguments: argparse.Namespace) -> None:
    """Raises ConfigError for options that would have no effect."""
    if arguments.lm_eval:
        for name in SUITES_ALONE:
            if getattr(arguments, name):
                raise ConfigError(f"--{name}: no effect with --lm-eval, whose tasks say it")
    elif arguments.num_fewshot is not None or arguments.apply_chat_template:
        raise ConfigError(
            "--num-fewshot, --apply-chat-template: no effect without --lm-eval; suites have "
            "protocols"
        )


def opened(arguments: argparse.Namespace) -> Callable[[], None]:
    """Tasks to ask, after every check that needs no engine. Raises ConfigError, DataError."""
    from megatron_opd.bench.configuration import configuration
    from megatron_opd.bench.harness import HarnessBench, check
    from megatron_opd.world import torchrun

    words: list[str] = arguments.words
    recipe = words[0] if words else None
    config = configuration(recipe, words[1:], arguments.model, arguments.seed)
    tasks = [name for text in arguments.lm_eval for name in text.split(",") if name]
    bench = HarnessBench(
        config,
        tuple(Path(task) if task.endswith((".yaml", ".yml")) else task for task in tasks),
        arguments.out,
        num_fewshot=arguments.num_fewshot,
        chat_template=arguments.apply_chat_template,
        limit=arguments.limit,
        max_tokens=arguments.max_tokens,
    )
    if not os.environ.get(torchrun.PREFLIGHT_DONE):
        check(bench)
    return partial(_run_and_show, bench)


def _run_and_show(bench: "HarnessBench") -> None:
    from megatron_opd.bench.harness import run_harness

    table = run_harness(bench)
    if table is not None:
        print(table)
