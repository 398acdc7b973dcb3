"""Checks what must be right on a GPU and measures what must be fast: docs/hardware.md.

    python tools/gpu_check.py                       # about 7 minutes on one GPU of 80 GB or more
    python tools/gpu_check.py --only race speed     # some sections
    python tools/gpu_check.py --small               # small sizes; without a GPU on the host,
                                                    # kernels interpreted

Every row is in the JSON file as soon as it is known. Exit code 1: a check failed; 2: nothing could
be checked.
"""

import argparse
import importlib
import importlib.util
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    from tools.gpu_sections.machine import Machine
    from tools.gpu_sections.rows import Row

SECTIONS = (
    "device",
    "kernels",
    "race",
    "big",
    "fused",
    "layers",
    "models",
    "offload",
    "probes",
    "speed",
    "planner",
)
NEEDED = ("torch", "megatron.core", "transformers", "numpy", "rich")
WITH_TRITON = ("kernels", "race", "big", "fused")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Check and measure on a GPU.")
    parser.add_argument(
        "--small", action="store_true", help="small sizes; the host serves where there is no GPU"
    )
    parser.add_argument(
        "--only", nargs="+", choices=SECTIONS, metavar="SECTION", help=f"of {', '.join(SECTIONS)}"
    )
    parser.add_argument(
        "--seconds", type=float, default=400.0, help="no section begins later (%(default)s)"
    )
    parser.add_argument(
        "--json", type=Path, default=Path("runs/gpu_check.json"), help="(%(default)s)"
    )
    arguments = parser.parse_args(argv)
    deadline = time.perf_counter() + arguments.seconds
    if missing := [name for name in NEEDED if not _has(name)]:
        print(
            f"gpu_check: not installed: {', '.join(missing)}; see docs/hardware.md", file=sys.stderr
        )
        return 2
    machine = _machine(arguments.small, deadline)
    if machine is None:
        print(
            "gpu_check: torch finds no usable CUDA device; --small checks small sizes on the host "
            "(make gpu-check SMALL=1)",
            file=sys.stderr,
        )
        return 2
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    names = arguments.only or SECTIONS
    for line in _missing(machine):
        print(line, flush=True)
    report = Report(arguments.json)
    for name in names:
        report.take(name, rows_of_section(name, machine))
        machine.tidy()
    report.show()
    return 1 if report.failures else 0


class Report:
    """The rows of this run, on the screen and in the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[tuple[str, Row]] = []
        self.seconds: dict[str, float] = {}
        self._save()

    def take(self, section: str, rows: Iterator["Row"]) -> None:
        start = time.perf_counter()
        for row in rows:
            self.rows.append((section, row))
            print(
                f"{row.outcome:8} {section:8} {row.what:72} {row.shown:>12}  {row.limit}",
                flush=True,
            )
            self._save()
        self.seconds[section] = time.perf_counter() - start
        self._save()

    @property
    def failures(self) -> list[tuple[str, "Row"]]:
        return [(section, row) for section, row in self.rows if row.outcome == "FAILED"]

    def show(self) -> None:
        """A table, the counts, and the failures once more."""
        from rich import box
        from rich.console import Console
        from rich.table import Table

        table = Table(
            "section",
            "what",
            "value",
            "limit",
            "",
            title="gpu-check",
            box=box.SIMPLE,
            pad_edge=False,
        )
        for section, row in self.rows:
            table.add_row(section, row.what, row.shown, row.limit, row.outcome)
        Console(width=None if sys.stdout.isatty() else 170, markup=False).print(table)
        print(", ".join(f"{name} {seconds:.0f} s" for name, seconds in self.seconds.items()))
        outcomes = [row.outcome for _, row in self.rows]
        counts = ", ".join(
            f"{outcomes.count(outcome)} {outcome}" for outcome in sorted(set(outcomes))
        )
        print(f"{counts}; wrote {self.path}")
        for section, row in self.failures:
            print(f"FAILED {section}: {row.what} = {row.shown}, must be {row.limit}")

    def _save(self) -> None:
        rows = [{"section": section, **asdict(row)} for section, row in self.rows]
        whole: dict[str, Any] = {"seconds": self.seconds, "rows": rows}
        part = self.path.with_name(self.path.name + ".part")
        part.write_text(json.dumps(whole, indent=1))
        part.replace(self.path)


def _machine(small: bool, deadline: float) -> "Machine | None":
    """The GPU where one is usable, whatever vLLM is built for; else, if small, the host."""
    import torch

    from megatron_opd.world.device import choice
    from megatron_opd.world.host import VARIABLE

    os.environ.setdefault(VARIABLE, "cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = choice().kind == "cuda"
    if not on_gpu and not small:
        return None
    os.environ["TRITON_INTERPRET"] = "0" if on_gpu else "1"  # read when the kernels are made
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    from tools.gpu_sections.machine import Machine

    return Machine(
        torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu"),
        small,
        deadline,
    )


def _missing(machine: "Machine") -> Iterator[str]:
    if not machine.is_cuda:
        yield (
            "no GPU is used: kernels are interpreted, the rest runs on the host; "
            "speeds mean nothing"
        )
    if not _has("triton"):
        yield f"triton is not installed: {', '.join(WITH_TRITON)} are skipped"
    if not _has("liger_kernel"):
        yield "liger-kernel is not installed: its speed is not measured"


def rows_of_section(name: str, machine: "Machine") -> Iterator["Row"]:
    """Those of a section; an error ends the section, not the check."""
    from tools.gpu_sections.rows import Row, failed, skipped

    if machine.seconds_left < 0:
        yield Row("the section", "left out", "to begin before --seconds are over", "FAILED")
        return
    if name in WITH_TRITON and not _has("triton"):
        yield skipped("the section", "needs triton")
        return
    try:
        section: ModuleType = importlib.import_module(f"tools.gpu_sections.{name}")
        yield from section.check(machine)
    except Exception as error:
        traceback.print_exc()
        yield failed("the section", error)


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


if __name__ == "__main__":
    code = main()
    if "megatron_opd.world.processes" in sys.modules:
        sys.modules["megatron_opd.world.processes"].stop()
    sys.exit(code)
