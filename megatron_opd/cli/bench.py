"""`megatron-opd bench`: suites asked of a model, listed, compared and graded again."""

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_opd.cli.adding import Commands, positive
from megatron_opd.errors import ConfigError
from megatron_opd.start import warn

if TYPE_CHECKING:
    from megatron_opd.bench.run import Bench

ACTIONS = ("list", "compare", "regrade")


def add(added: Commands) -> None:
    """Adds the command to the parser."""
    parser = added.add(
        "bench",
        bench,
        "ask a model the questions of benchmark suites, or compare two results",
    )
    parser.add_argument(
        "words",
        metavar="[RECIPE [KEY=VALUE ...]] | list | compare A B | regrade DIR",
        nargs="*",
        help="a recipe, whose student, template and engine are used; without one give --model",
    )
    parser.add_argument("--model", metavar="DIR", help="Hugging Face directory")
    parser.add_argument(
        "--suites",
        metavar="NAMES",
        action="append",
        help="names and groups with commas between them, or YAML files of your own suites",
    )
    parser.add_argument("--out", metavar="DIR", type=Path, help="a new one, or one to go on with")
    parser.add_argument(
        "--protocol",
        choices=["official", "luffy", "tropd"],
        default="official",
        help="how many samples, how long, which prompt and grader; default official",
    )
    parser.add_argument(
        "--samples", metavar="N", type=positive, help="of every question, not the protocol's"
    )
    parser.add_argument(
        "--data",
        metavar="SUITE=PATH",
        action="append",
        help="a file or folder with a suite's data; without it they come from the Hub",
    )
    parser.add_argument("--seed", metavar="N", type=int, help="default: the recipe's, or 0")
    parser.add_argument(
        "--server", metavar="URL", help="one that holds the model, and speaks the completions API"
    )
    parser.add_argument("--nproc", metavar="N", type=positive, help="engines to start, one each")
    parser.add_argument("--json", metavar="FILE", type=Path, help="compare: write it there too")


def bench(arguments: argparse.Namespace) -> int | None:
    """Runs what the first word names, or else the suites."""
    action, *rest = [*arguments.words, ""]
    if action in ACTIONS:
        words = [word for word in rest if word]
        return {"list": _list, "compare": _compare, "regrade": _regrade}[action](words, arguments)
    return _run(arguments)


def _list(words: list[str], _: argparse.Namespace) -> int:
    from megatron_opd.suites.listing import show_suites

    if words:
        raise ConfigError(f"bench list: {words[0]!r} has no effect; it lists every suite")
    show_suites()
    return 0


def _compare(words: list[str], arguments: argparse.Namespace) -> int:
    from megatron_opd.bench.compare import compare

    if len(words) != 2:
        raise ConfigError("bench compare: give two directories, A and B, of `bench --out`")
    compare(Path(words[0]), Path(words[1]), json_file=arguments.json)
    return 0


def _regrade(words: list[str], arguments: argparse.Namespace) -> int:
    from megatron_opd.bench.again import regrade

    if len(words) != 1 or arguments.out is None:
        raise ConfigError(
            "bench regrade: give the directory of a result, and --out for the new one"
        )
    regrade(Path(words[0]), arguments.out, dict(_data(arguments)))
    return 0


def _run(arguments: argparse.Namespace) -> int:
    from megatron_opd.world import torchrun

    if torchrun.is_worker():
        torchrun.die_with_parent(signal.SIGKILL)
    if not arguments.suites or arguments.out is None:
        raise ConfigError(
            "bench: --suites and --out are missing; `megatron-opd bench list` has the suites"
        )
    launched = "WORLD_SIZE" in os.environ
    if arguments.server and (arguments.nproc or launched):
        raise ConfigError("--nproc: no effect with --server, which has processes of its own")
    bench = _opened(arguments)
    if arguments.nproc and arguments.nproc > 1 and not launched:
        return torchrun.run_workers(arguments.nproc, ["-m", "megatron_opd", *sys.argv[1:]])
    from megatron_opd.bench.run import run
    from megatron_opd.world import processes

    if launched:
        processes.start()
    try:
        results = run(bench)
    finally:
        processes.stop()
    if results is not None:
        from megatron_opd.bench.page import write_page
        from megatron_opd.bench.table import print_table

        print_table(results)
        print(write_page(bench.out))
    return 0


def _opened(arguments: argparse.Namespace) -> "Bench":
    """Every check that needs no engine."""
    from megatron_opd.bench.configuration import configuration
    from megatron_opd.bench.run import Bench
    from megatron_opd.suites.open import open_suites

    recipe, *overrides = [*arguments.words, None] if arguments.words else [None]
    keys = [word for word in overrides if word]
    if recipe and "=" in recipe:
        raise ConfigError(f"{recipe}: keys are a recipe's; name it first")
    config = configuration(recipe, keys, arguments.model, arguments.seed)
    suites = open_suites(
        [name for text in arguments.suites for name in text.split(",") if name],
        protocol=arguments.protocol,
        data=dict(_data(arguments)),
        samples=arguments.samples,
    )
    warn([warning for suite in suites for warning in suite.warnings])
    return Bench(config, suites, arguments.out, arguments.server)


def _data(arguments: argparse.Namespace) -> list[tuple[str, str]]:
    pairs = []
    for text in arguments.data or []:
        name, equals, path = text.partition("=")
        if not equals or not name or not path:
            raise ConfigError(f"--data {text}: write SUITE=PATH, such as aime24=data/aime24.jsonl")
        pairs.append((name, path))
    return pairs
