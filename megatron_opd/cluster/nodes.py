"""The nodes' reports on themselves before a job begins, and which nodes are unfit.

Every node's first process writes a file on the shared file system; rank 0 reads them all. A node
that cannot write there, or never comes up, is named because its file is missing.
"""

import json
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from megatron_opd import __version__
from megatron_opd.cluster import slurm
from megatron_opd.cluster.job import Job
from megatron_opd.errors import ConfigError
from megatron_opd.files.atomic import write_atomically

MAX_CLOCK_SECONDS = 60  # between a node's clock and the file system's
MIN_FREE_GIB = 1
CHECK_SECONDS = 120


@dataclass(frozen=True)
class Report:
    """The report of one node. `problem` is "" where it is fit."""

    node: str
    problem: str
    version: str
    torch: str


def report(job: Job, attempt: Path, node: str) -> Report:
    """Checks this node and leaves its report in `attempt`."""
    import torch

    result = Report(node, _problem(job, attempt, node), __version__, torch.__version__)
    write_atomically(attempt / f"{node}.json", json.dumps(asdict(result)).encode())
    return result


def unfit(attempt: Path, nodes: list[str], *, seconds: float) -> dict[str, str]:
    """Node -> what is wrong with it, once all have reported or `seconds` have passed."""
    until = time.monotonic() + seconds
    reports: dict[str, Report] = {}
    while len(reports) < len(nodes) and time.monotonic() < until:
        for node in set(nodes) - set(reports):
            path = attempt / f"{node}.json"
            if path.is_file():
                reports[node] = Report(**json.loads(path.read_text()))
        time.sleep(0.1)
    problems = {
        node: f"did not report within {seconds:.0f} s" for node in nodes if node not in reports
    }
    problems |= {node: result.problem for node, result in reports.items() if result.problem}
    first = next((reports[node] for node in nodes if node in reports), None)
    for node, result in reports.items():
        if first and (result.version, result.torch) != (first.version, first.torch):
            problems.setdefault(node, f"has torch {result.torch}, {first.node} has {first.torch}")
    return problems


def _problem(job: Job, attempt: Path, node: str) -> str:
    stamp = attempt / f".{node}.clock"
    stamp.touch()
    behind = abs(time.time() - stamp.stat().st_mtime)
    if behind > MAX_CLOCK_SECONDS:
        return f"its clock is {behind:.0f} s off that of {attempt}"
    free = shutil.disk_usage(attempt).free / 2**30
    if free < MIN_FREE_GIB:
        return f"{free:.1f} GiB are free on {attempt}"
    return _gpu_problem(job.cluster.gpus_per_node) or _own_check(job.cluster.node_check)


def _gpu_problem(wanted: int) -> str:
    """The problem of the node's GPUs; "" without one.

    Another process finds out: one that computes on a GPU holds some of its memory until it ends,
    and may hang.
    """
    if wanted == 0:
        return ""
    command = [sys.executable, "-m", "megatron_opd.cluster.nodes", str(wanted)]
    return _run(command, "the check of its GPUs")


def _own_check(command: str) -> str:
    return _run(["bash", "-c", command], "cluster.node_check") if command else ""


def _run(command: list[str], name: str) -> str:
    """Runs a check. Returns the last line of its output if it failed, else ""."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CHECK_SECONDS)
    except subprocess.TimeoutExpired:
        return f"{name} took more than {CHECK_SECONDS} s"
    if not done.returncode:
        return ""
    output = (done.stderr or done.stdout).strip().splitlines()
    return f"{name} failed: {output[-1]}" if output else f"{name} failed"


def _use_gpus(wanted: int) -> None:
    """Computes something on every GPU. Ends the process where one is missing or fails."""
    import torch

    visible = torch.cuda.device_count()
    if visible != wanted:
        sys.exit(f"{visible} of {wanted} GPUs are visible")
    for index in range(visible):
        try:
            torch.ones(1024, device=f"cuda:{index}").sum().item()
        except RuntimeError as error:
            sys.exit(f"GPU {index}: {str(error).splitlines()[0]}")


def address(node: str) -> str:
    """The address by which other nodes reach this one: the one that Slurm itself uses."""
    try:
        words = slurm.ask("scontrol", "show", "node", node, "-o").split()
    except ConfigError:  # in a container there may be no such command
        return node
    prefix = "NodeAddr="
    return next((word.removeprefix(prefix) for word in words if word.startswith(prefix)), node)


def interface(towards: str) -> str:
    """The network interface through which this node reaches another; "" where that is unknown.

    gloo by itself takes the interface that this node's own name resolves to, which on some systems
    is the loopback.
    """
    try:
        family, kind, _protocol, _name, there = socket.getaddrinfo(
            towards, 9, type=socket.SOCK_DGRAM
        )[0]
        with socket.socket(family, kind) as route:
            route.connect(there)  # a datagram socket sends nothing when it connects
            own = route.getsockname()[0]
    except OSError:
        return ""
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == own for address in addresses):
            return name
    return ""


if __name__ == "__main__":
    _use_gpus(int(sys.argv[1]))
