"""What the benchmarks share: sides that take turns, and the end of a report."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def in_turn(sides: Mapping[str, Callable[[], Any]], repeat: int) -> dict[str, list[float]]:
    """Side -> seconds of each of `repeat` runs, after one that warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeat + 1):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def report(table: Table, results: Any, out: Path) -> None:
    """Prints the table, writes the numbers."""
    Console(width=100).print(table)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1))
    print(f"wrote {out}")
