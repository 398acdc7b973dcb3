"""Programs in ranks that are forked from one process, which has imported everything: no imports, no
launcher.

Importing takes a rank ten seconds and more, as long as most of what the tests start has to do. What
torchrun and the command's own launcher add is tested where those are started.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import wait
from pathlib import Path

from megatron_opd.world.torchrun import die_with_parent

REPOSITORY = Path(__file__).parents[1]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.forked_imports"])


def run(
    program: str | Path, nproc: int | None, *args: object, timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    """Runs `program` (a path ending in .py, or a module name) in `nproc` processes that find what
    torchrun gives.

    None: in one that finds nothing of it. Waits for all of them, or until one fails or `timeout`
    seconds have passed; then the others are killed. Returns the first code that is not 0 (negative:
    a signal), and stdout and stderr of all.
    """
    from torch.distributed import TCPStore

    # torchrun's agent has one
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    world = {
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    places = (
        [world | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(nproc)]
        if nproc
        else [{}]
    )
    argv = [str(program), *map(str, args)]
    with tempfile.TemporaryDirectory() as folder:
        outputs = [tuple(str(Path(folder, f"{rank}.{stream}")) for stream in ("out", "err"))
                   for rank in range(len(places))]  # fmt: skip
        ranks = [
            _context.Process(
                target=_rank, args=(argv, os.environ | {"OMP_NUM_THREADS": "1"} | place, output)
            )
            for place, output in zip(places, outputs, strict=True)
        ]
        try:
            for rank in ranks:
                rank.start()
            code = _first_failure(ranks, time.monotonic() + timeout)
        finally:
            for rank in ranks:
                rank.kill()
                rank.join()
        stdout, stderr = (
            "".join(Path(each).read_text() for each in stream)
            for stream in zip(*outputs, strict=True)
        )
    return subprocess.CompletedProcess(argv, code, stdout, stderr)


def _first_failure(ranks: list, deadline: float) -> int:
    running = {rank.sentinel: rank for rank in ranks}
    while running:
        ended = wait(running, max(0.0, deadline - time.monotonic()))
        if not ended:
            return -signal.SIGALRM
        for sentinel in ended:
            if code := running.pop(sentinel).exitcode:
                return code
    return 0


def _rank(argv: list[str], env: dict[str, str], output: tuple[str, str]) -> None:
    die_with_parent(signal.SIGKILL)
    for path, descriptor in zip(output, (1, 2), strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), descriptor)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(REPOSITORY)
    sys.argv = argv
    if argv[0].endswith(".py"):
        runpy.run_path(argv[0], run_name="__main__")
    else:
        runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
