"""`megatron-opd bench`: suites asked of a model, listed, compared and graded again."""

import argparse
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_opd.cli import harness
from megatron_opd.cli.adding import Commands, natural, positive
from megatron_opd.errors import ConfigError
from megatron_opd.files.atomic import write_atomically
from megatron_opd.start import warn
from megatron_opd.world.worker import say

if TYPE_CHECKING:
    from megatron_opd.bench.results import Result
    from megatron_opd.bench.run import Bench

ONE_DAY = 24 * 60.0  # minutes


def add(added: Commands) -> None:
    """Adds the command to the parser."""
    parser = added.add(
        "bench",
        bench,
        "ask a model the questions of benchmark suites, or compare two results",
    )
    parser.add_argument(
        "words",
        metavar="[RECIPE [KEY=VALUE ...]] | list | compare A B | regrade DIR | traces DIR",
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
        "--max-tokens", metavar="N", type=positive, help="of a completion, not the protocol's"
    )
    parser.add_argument(
        "--limit", metavar="N", type=positive, help="ask a share of N questions, by their groups"
    )
    parser.add_argument(
        "--data",
        metavar="SUITE=PATH",
        action="append",
        help="a file or folder with a suite's data; without it they come from the Hub",
    )
    parser.add_argument("--seed", metavar="N", type=natural, help="default: the recipe's, or 0")
    parser.add_argument(
        "--server", metavar="URL", help="one that holds the model, and speaks the completions API"
    )
    parser.add_argument("--nproc", metavar="N", type=positive, help="engines to start, one each")
    parser.add_argument("--json", metavar="FILE", type=Path, help="compare: write it there too")
    parser.add_argument(
        "--keep",
        choices=["first", "shortest", "all"],
        default="first",
        help="traces: which right samples of a question; default first",
    )
    harness.add_options(parser)


def bench(arguments: argparse.Namespace) -> int:
    """Runs what the first word names, or else the suites."""
    words: list[str] = arguments.words
    match words[:1]:
        case ["list"]:
            return _list(words[1:])
        case ["compare"]:
            return _compare(words[1:], arguments.json)
        case ["regrade"]:
            return _regrade(words[1:], arguments)
        case ["traces"]:
            return _traces(words[1:], arguments)
    return _run(arguments)


def _list(words: list[str]) -> int:
    from megatron_opd.bench.table import print_suites
    from megatron_opd.suites.listing import listed_suites

    if words:
        raise ConfigError(f"bench list: {words[0]!r} has no effect; it lists every suite")
    print_suites(listed_suites())
    return 0


def _compare(words: list[str], json_file: Path | None) -> int:
    from megatron_opd.bench.compare import as_json, compare_results
    from megatron_opd.bench.table import print_comparison

    if len(words) != 2:
        raise ConfigError("bench compare: give two directories, A and B, of `bench --out`")
    comparison = compare_results(Path(words[0]), Path(words[1]))
    if json_file:
        write_json(json_file, as_json(comparison))
    print_comparison(comparison)
    return 0


def write_json(path: Path, text: str) -> None:
    """Writes a file that the user named. Raises ConfigError."""
    try:
        write_atomically(path, (text + "\n").encode())
    except OSError as error:
        raise ConfigError(f"--json {path}: cannot be written ({error.strerror})") from None


def _regrade(words: list[str], arguments: argparse.Namespace) -> int:
    from megatron_opd.bench.regrade import regrade_directory

    if len(words) != 1 or arguments.out is None:
        raise ConfigError("bench regrade: give a result's directory, and --out for the new one")
    regrade_directory(Path(words[0]), arguments.out, _data(arguments), _names(arguments))
    return 0


def _traces(words: list[str], arguments: argparse.Namespace) -> int:
    from megatron_opd.bench.traces import traces_of_result

    if len(words) != 1 or arguments.out is None:
        raise ConfigError("bench traces: give a result's directory, and --out FILE.parquet")
    traces_of_result(
        Path(words[0]), arguments.out, arguments.keep, _data(arguments), _names(arguments)
    )
    return 0


def _run(arguments: argparse.Namespace) -> int:
    from megatron_opd.world import processes, torchrun

    if torchrun.is_worker():
        torchrun.die_with_parent(signal.SIGKILL)
    harness.check_options(arguments)
    if not (_names(arguments) or arguments.lm_eval) or arguments.out is None:
        raise ConfigError(
            "bench: --suites and --out are missing; `megatron-opd bench list` has the suites"
        )
    launched = "WORLD_SIZE" in os.environ
    if arguments.server and (arguments.nproc or launched):
        raise ConfigError("--nproc: no effect with --server, which has processes of its own")
    opened = harness.opened if arguments.lm_eval else _opened
    if arguments.nproc and arguments.nproc > 1 and not launched:
        opened(arguments)  # what is wrong is said once, before processes start
        code, message = torchrun.run_workers(arguments.nproc, ["-m", "megatron_opd", *sys.argv[1:]])
        say(code, message)
        return code
    work = opened(arguments)
    processes.start(timeout_minutes=ONE_DAY)  # one may have nothing left long before another
    try:
        work()
    finally:
        processes.stop()
    return 0


def _run_and_show(bench: "Bench") -> None:
    from megatron_opd.bench.run import run

    result = run(bench)
    if result is not None:
        show(result, bench.out)


def show(result: "Result", directory: Path) -> None:
    """Prints the table and writes the page."""
    from megatron_opd.bench.page import write_page
    from megatron_opd.bench.table import print_result

    print_result(result)
    print(f"wrote {write_page(directory)}")


def _opened(arguments: argparse.Namespace) -> Callable[[], None]:
    """Suites to ask, after every check that needs no engine."""
    from megatron_opd.bench.configuration import configuration, training_problems
    from megatron_opd.bench.run import Bench
    from megatron_opd.suites.open import open_suites
    from megatron_opd.verify.graders.open import check_grader
    from megatron_opd.world import torchrun

    words: list[str] = arguments.words
    if words and "=" in words[0]:
        raise ConfigError(f"{words[0]}: keys are a recipe's; name it first")
    recipe = words[0] if words else None
    config = configuration(recipe, words[1:], arguments.model, arguments.seed)
    warnings: list[str] = []
    suites = open_suites(
        _names(arguments),
        protocol=arguments.protocol,
        data=_data(arguments),
        samples=arguments.samples,
        max_tokens=arguments.max_tokens,
        limit=arguments.limit,
        seed=config.seed,
        warn=warnings.append,
    )
    if not os.environ.get(torchrun.PREFLIGHT_DONE):
        warn(warnings)
    for suite in suites:
        check_grader(suite.protocol)
    problems = partial(training_problems, config, lambda text: warn([text]))
    return partial(_run_and_show, Bench(config, suites, arguments.out, arguments.server, problems))


def _names(arguments: argparse.Namespace) -> list[str]:
    """The suites that are asked for."""
    return [name for text in arguments.suites or [] for name in text.split(",") if name]


def _data(arguments: argparse.Namespace) -> dict[str, str]:
    """The data of suites by name."""
    paths = {}
    for text in arguments.data or []:
        name, _, path = text.partition("=")
        if not name or not path:
            raise ConfigError(f"--data {text}: write SUITE=PATH, such as aime24=data/aime24.jsonl")
        paths[name] = path
    return paths
