"""Tests that the nodes of a job reach one another: an all-reduce that may fail without harm.

Every rank makes it in a process of its own (`python -m megatron_opd.cluster.probe`). Where it does
not come through, the nodes try it alone and with their neighbours, and those for which nothing
works are named. The ranks exchange the results in files, as the nodes do with their reports: the
shared file system is the one thing known to work.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from megatron_opd.cluster.place import Place
from megatron_opd.errors import RunError
from megatron_opd.files.atomic import write_atomically

SEARCH_SECONDS = 120.0  # for an all-reduce of one node or two
NUMBERS = 1 << 20  # that are summed up

Group = tuple[int, ...]  # nodes, by their index in the job


def unreachable(place: Place, host: str, attempt: Path, seconds: float) -> dict[str, str]:
    """Node -> its problem, the same on every rank; empty where all nodes reach each other.

    `host` is the address by which others reach this node; the first all-reduce may take `seconds`.
    Raises RunError where that fails and yet no node is known to be at fault.
    """
    everyone = tuple(range(len(place.nodes)))
    search = min(seconds, SEARCH_SECONDS)
    failed = _round(0, [everyone], place, host, attempt, seconds)
    if not failed:
        return {}
    alone = _round(1, [(node,) for node in everyone], place, host, attempt, search)
    unfit = {node: problem for (node,), problem in alone.items()}
    if not alone:
        of_pairs: dict[Group, str] = {}
        for number, groups in enumerate(rounds(len(everyone)), start=2):
            of_pairs |= _round(number, groups, place, host, attempt, search)
        unfit = at_fault(of_pairs, len(everyone))
    if not unfit:
        raise RunError(
            f"an all-reduce over {len(everyone)} nodes failed, yet every node has one that works: "
            f"{failed[everyone]}"
        )
    return {place.nodes[node]: problem for node, problem in unfit.items()}


def ring(nodes: int) -> list[Group]:
    """Each node with the next one, the last with the first; two nodes make one pair."""
    pairs = nodes if nodes > 2 else nodes - 1
    return [(node, (node + 1) % nodes) for node in range(pairs)]


def rounds(nodes: int) -> Iterator[list[Group]]:
    """The pairs of the ring, in rounds: no node is in two pairs of a round."""
    pairs = ring(nodes)
    while pairs:
        together: list[Group] = []
        for pair in pairs:
            if not any(set(pair) & set(other) for other in together):
                together.append(pair)
        yield together
        pairs = [pair for pair in pairs if pair not in together]


def at_fault(failed: dict[Group, str], nodes: int) -> dict[int, str]:
    """The nodes that fail with all of their neighbours, with their problems.

    Of a single pair that fails nobody can say which node it is.
    """
    unfit = {}
    for node in range(nodes):
        pairs = [pair for pair in ring(nodes) if node in pair]
        if pairs and all(pair in failed for pair in pairs):
            unfit[node] = f"no all-reduce with its neighbours comes through: {failed[pairs[0]]}"
    return unfit


# ------------------------------------------------------------------------------------------ a round
def _round(
    number: int, groups: list[Group], place: Place, host: str, attempt: Path, seconds: float
) -> dict[Group, str]:
    """The groups that failed, with their first problem. Rank 0 decides when the round is over."""
    path = attempt / f"probe-{number}"
    if place.rank == 0:
        path.mkdir()
    # rank 0 may wait that long for a node's report
    _wait_for(path, f"rank 0 on {place.nodes[0]}", seconds + 60)
    decision = path / "failed.json"
    child = _start(path, groups, place, host, seconds)
    judge = _Judge(path, groups, place.per_node) if place.rank == 0 else None
    until = time.monotonic() + seconds
    while not decision.is_file():
        if child is not None and child.poll() is not None:
            _leave_result(path, _index(place), child.returncode)
            child = None
        if judge is not None and (judge.is_done() or time.monotonic() > until):
            write_atomically(decision, json.dumps(judge.failed()).encode())
        if time.monotonic() > until + 60:
            raise RunError(
                f"{decision}: rank 0 on {place.nodes[0]} has not written it within "
                f"{seconds + 60:.0f} s"
            )
        time.sleep(0.1)
    if child is not None:
        child.kill()
        child.wait()
    return {tuple(group): problem for group, problem in json.loads(decision.read_text())}


def _index(place: Place) -> int:
    return place.nodes.index(place.node) * place.per_node + place.local_rank


def _indices(group: Group, per_node: int) -> list[int]:
    return [node * per_node + local for node in group for local in range(per_node)]


def _start(
    path: Path, groups: list[Group], place: Place, host: str, seconds: float
) -> "subprocess.Popen[bytes] | None":
    """Starts this rank's process, if its node is in this round. Its output goes into a file."""
    for number, group in enumerate(groups):
        ranks = _indices(group, place.per_node)
        if _index(place) in ranks:
            meeting = path / f"{number}.meet"
            arguments = [meeting, ranks.index(_index(place)), len(ranks), host, seconds]
            command = [sys.executable, "-m", "megatron_opd.cluster.probe", *map(str, arguments)]
            own = os.environ | {"LOCAL_RANK": str(place.local_rank)}
            with (path / f"{_index(place)}.log").open("wb") as log:
                return subprocess.Popen(command, env=own, stdout=log, stderr=log)
    return None


def _leave_result(path: Path, index: int, code: int) -> None:
    """Writes what went wrong in this rank's process: an empty file where all went well."""
    text = (path / f"{index}.log").read_text(errors="replace")
    lines = [line for line in text.splitlines() if line.strip()]
    problem = ""
    if code:
        problem = lines[-1] if lines else f"it ended with {code}"
    write_atomically(path / f"{index}.result", problem.encode())


class _Judge:
    """Rank 0's view of a round."""

    def __init__(self, path: Path, groups: list[Group], per_node: int) -> None:
        self.path = path
        self.ranks = {group: _indices(group, per_node) for group in groups}
        self.results: dict[int, str] = {}

    def is_done(self) -> bool:
        """True when the outcome of every group is known; one rank that fails decides it."""
        for ranks in self.ranks.values():
            for rank in set(ranks) - set(self.results):
                file = self.path / f"{rank}.result"
                if file.is_file():
                    self.results[rank] = file.read_text()
        return all(
            self._problem(ranks) or all(rank in self.results for rank in ranks)
            for ranks in self.ranks.values()
        )

    def _problem(self, ranks: list[int]) -> str:
        return next((problem for rank in ranks if (problem := self.results.get(rank))), "")

    def failed(self) -> list[tuple[Group, str]]:
        return [
            (group, self._problem(ranks) or "it hung")
            for group, ranks in self.ranks.items()
            if not all(self.results.get(rank) == "" for rank in ranks)
        ]


# ----------------------------------------------------------------------------------- the all-reduce
def meet(written: Path, host: str, seconds: float, *, first: bool) -> tuple[str, int, Any]:
    """Address, port and object of the store that the first process serves on a free port.

    The object is None in the other processes. Raises RunError.
    """
    from torch.distributed import TCPStore

    store = None
    if first:
        store = TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False)
        write_atomically(written, json.dumps({"host": host, "port": store.port}).encode())
    _wait_for(written, "the first process", seconds)
    meeting = json.loads(written.read_text())
    return meeting["host"], meeting["port"], store


def _wait_for(path: Path, who: str, seconds: float) -> None:
    until = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > until:
            raise RunError(f"{path}: {who} has not written it within {seconds:.0f} s")
        time.sleep(0.1)


def main(written: Path, rank: int, size: int, host: str, seconds: float) -> None:
    import torch
    import torch.distributed as dist

    from megatron_opd.world.device import backend, device

    if device().type == "cuda":
        torch.cuda.set_device(device())
    timeout = timedelta(seconds=seconds)
    address, port, store = meet(written, host, seconds, first=rank == 0)
    store = store or dist.TCPStore(address, port, is_master=False, timeout=timeout)
    dist.init_process_group(backend(), store=store, rank=rank, world_size=size, timeout=timeout)
    ones = torch.ones(NUMBERS, device=device())
    dist.all_reduce(ones)
    if not bool((ones == size).all()):
        raise RunError(f"the sum of {size} ones is {ones.max().item()}")
    store.set(f"done {rank}", "")
    if rank == 0:  # it serves the store
        store.wait([f"done {other}" for other in range(size)], timeout)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], float(sys.argv[5]))
    os._exit(0)  # torch's threads now and then abort a process that ends as usual while they run
