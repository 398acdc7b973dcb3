"""A program started once per number of processes, which measures every layout that takes as many.

`layouts` in both halves: processes -> rows, each a layout's name and what else `work` takes.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Layouts = Mapping[int, Sequence[tuple]]


def measured(
    run_distributed: Callable, program: str, directory: Path, layouts: Layouts
) -> dict[str, Any]:
    """The test's half: a layout's name -> what the program has found on it."""
    results: dict[str, Any] = {}
    for nproc in layouts:
        run_distributed(program, nproc, directory, timeout=280)
        results |= json.loads((directory / f"{nproc}.json").read_text())
    return results


def measure(layouts: Layouts, work: Callable[..., Any]) -> int:
    """The program's half: `work(directory, *row)` of every row; rank 0 writes what it returns,
    which JSON can hold."""
    import torch.distributed as dist

    from megatron_opd.world import processes

    directory = Path(sys.argv[1])
    processes.start()
    world = dist.get_world_size()
    results = {row[0]: work(directory, *row) for row in layouts[world]}
    if dist.get_rank() == 0:
        (directory / f"{world}.json").write_text(json.dumps(results))
    processes.stop()
    return 0
