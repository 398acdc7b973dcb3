"""What a program in the sandbox costs, and how many solutions a second are graded.

    python benchmarks/sandbox.py [--repeat 5] [--programs 40] [--workers 2]

The bare interpreter, started anew for every program, is compared with a sandbox's server: with
limits, seccomp and Landlock, with bubblewrap in the place of Landlock, and with all of them. Then
invented problems in LiveCodeBench's format are graded, each right solution of some tests, each in a
process of its own. Layers that the machine does not have are left out.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.turns import report  # noqa: E402
from megatron_opd.sandbox.interpreter import ENVIRONMENT, OPTIONS, base_python  # noqa: E402
from megatron_opd.sandbox.layers import Layers, layers  # noqa: E402
from megatron_opd.sandbox.run import Sandbox  # noqa: E402
from megatron_opd.verify.graders.code import CodeGrader  # noqa: E402
from megatron_opd.verify.graders.code_tests import read_tests  # noqa: E402
from tests.unit.code_problems import PROBLEMS, SOLUTIONS, answer  # noqa: E402


def variants() -> dict[str, Layers]:
    """The layers of a sandbox that this machine has, by name."""
    there = layers()
    left_out = "left out by the benchmark"
    possible = {
        "limits, seccomp, Landlock": replace(there, bubblewrap=left_out, command=[]),
        "limits, seccomp, bubblewrap": replace(there, landlock=left_out),
        "all": there,
    }
    needed = {
        "limits, seccomp, Landlock": (there.landlock,),
        "limits, seccomp, bubblewrap": (there.bubblewrap,),
        "all": (there.landlock, there.bubblewrap),
    }
    return {name: made for name, made in possible.items() if not any(needed[name])}


def processor_seconds() -> float:
    """The processor time of processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def bare(programs: int) -> dict[str, float]:
    """Milliseconds of a program that does nothing, without a sandbox."""
    command = [base_python(), *OPTIONS, "-c", "pass"]
    used = processor_seconds()
    started = time.perf_counter()
    for _ in range(programs):
        subprocess.run(command, env=ENVIRONMENT, stdin=subprocess.DEVNULL, check=True)
    return {
        "program_ms": 1000 * (time.perf_counter() - started) / programs,
        "program_cpu_ms": 1000 * (processor_seconds() - used) / programs,
    }


def started_first(there: Layers) -> float:
    """Milliseconds until a new sandbox has run its first program."""
    started = time.perf_counter()
    with Sandbox(there) as sandbox:
        assert sandbox.run("pass").reason == "ok"
        return 1000 * (time.perf_counter() - started)


def sandboxed(there: Layers, programs: int) -> dict[str, float]:
    """Milliseconds of a program that does nothing; the server's share is in them."""
    used = processor_seconds()
    with Sandbox(there) as sandbox:
        sandbox.run("pass")
    at_start = processor_seconds() - used
    with Sandbox(there) as sandbox:
        sandbox.run("pass")
        started = time.perf_counter()
        for _ in range(programs):
            assert sandbox.run("pass").reason == "ok"
        seconds = time.perf_counter() - started
    in_programs = processor_seconds() - used - 2 * at_start
    return {
        "program_ms": 1000 * seconds / programs,
        "program_cpu_ms": 1000 * in_programs / programs,
    }


def graded(there: Layers, workers: int, programs: int) -> dict[str, float]:
    """Solutions and tests a second, of different right solutions."""
    keys = list(SOLUTIONS)
    solutions = [
        answer(key, f"{SOLUTIONS[key]}\n# {number}")
        for number, key in enumerate(keys * (-(-programs // len(keys))))
    ]
    tests = sum(len(read_tests(PROBLEMS[each.asked.question.key]).inputs) for each in solutions)
    with CodeGrader({"workers": workers}, there) as grader:
        grader.grade([answer(key, SOLUTIONS[key]) for key in keys])  # every server starts
        started = time.perf_counter()
        verdicts = grader.grade(solutions)
        seconds = time.perf_counter() - started
    assert all(verdict.correct for verdict in verdicts)
    return {"solutions_per_second": len(solutions) / seconds, "tests_per_second": tests / seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description="What a program in the sandbox costs.")
    parser.add_argument("--repeat", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--programs", type=int, default=40, help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/sandbox.json")
    arguments = parser.parse_args()
    kinds = variants()
    alone = [bare(arguments.programs) for _ in range(arguments.repeat)]
    rows: dict[str, dict[str, list[float]]] = {}
    measures: dict[str, Callable[[Layers], dict[str, float]]] = {
        "start": lambda there: {"first_ms": started_first(there)},
        "program": lambda there: sandboxed(there, arguments.programs),
        "grading": lambda there: graded(there, arguments.workers, arguments.programs),
    }
    for _ in range(arguments.repeat):  # in turn, for a machine that others use too
        for name, there in kinds.items():
            for measure in measures.values():
                for key, value in measure(there).items():
                    rows.setdefault(name, {}).setdefault(key, []).append(value)
    results: dict[str, Any] = {
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "workers": arguments.workers,
        "programs": arguments.programs,
        "bare": alone,
        "sandboxes": rows,
    }
    table = Table(title=f"medians of {arguments.repeat}; {arguments.workers} workers")
    heads = ("first, ms", "a program, ms", "its processor, ms", "solutions/s", "tests/s")
    for head in ("", *heads):
        table.add_column(head, justify="right" if head else "left")
    medians = [statistics.median(each[name] for each in alone) for name in alone[0]]
    table.add_row("the bare interpreter", "", *(f"{value:.1f}" for value in medians))
    for name, row in rows.items():
        table.add_row(name, *(f"{statistics.median(values):.1f}" for values in row.values()))
    report(table, results, arguments.out)


if __name__ == "__main__":
    main()
