"""The processes of a world: how they start, stop and agree, and their shares of a list.

A world is the processes of one role, with a default process group of their own.
"""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_opd.world.channel import Channel
from megatron_opd.world.device import backend, choice, device


def start(timeout_minutes: float = 30.0, *, apart: dict[str, int] | None = None) -> None:
    """Chooses the device and joins the default process group.

    Without torchrun the group is of one process. `apart` is the number of processes set aside for
    each role: the last ones, in this order. A role has a default group of its own, and a channel
    joins it to the student's processes, the first ones.
    """
    if choice().kind == "cuda":
        torch.cuda.set_device(device())
    if dist.is_initialized():
        return
    timeout = timedelta(minutes=timeout_minutes)
    if "RANK" not in os.environ:
        store = dist.HashStore()
        dist.init_process_group(backend(), store=store, rank=0, world_size=1)
    elif apart:
        _start_apart(apart, timeout)
    else:
        dist.init_process_group(backend(), timeout=timeout)


_channels: dict[str, Channel] = {}


def _start_apart(apart: dict[str, int], timeout: timedelta) -> None:
    """Joins the group of this process's role.

    The student's processes come first, so that the rank whose output people read is 0.
    """
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    student = world = range(world_size - sum(apart.values()))
    first = len(student)
    for role, size in apart.items():
        serving = range(first, first + size)
        first += size
        if rank in serving:
            world = serving
        if rank in serving or rank in student:
            _channels[role] = Channel(dist.PrefixStore(role, store), rank, student, serving)
    store = dist.PrefixStore(f"world from {world[0]}", store)
    dist.init_process_group(
        backend(), store=store, rank=rank - world[0], world_size=len(world), timeout=timeout
    )


def channel(role: str) -> Channel | None:
    """The channel between the student's processes and those of `role`; None without such."""
    return _channels.get(role)


def own_role() -> str | None:
    """The role that this process is set aside for; None for the student's."""
    return next((role for role, channel in _channels.items() if channel.serves), None)


_when_stopped: list[Callable[[], None]] = []


def when_stopped(forget: Callable[[], None]) -> None:
    """Registers a function that drops references to process groups before `stop` ends them."""
    _when_stopped.append(forget)


def stop() -> None:
    """Leaves the default process group, and all others with it."""
    for forget in _when_stopped:
        forget()
    _when_stopped.clear()
    _channels.clear()
    if dist.is_initialized():
        dist.destroy_process_group()


# ---------------------------------------------------------------------- lists spread over the world
def share[T](items: list[T]) -> list[T]:
    """This rank's share of a list that every rank holds."""
    return items[dist.get_rank() :: dist.get_world_size()]


def gather_shares[T](own: list[T]) -> list[T]:
    """All results, on every rank, in the order of the items. Collective.

    `own` are this rank's, one for each item of its `share`.
    """
    shares: list[list[T]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(shares, own)
    results: list[T] = []
    for i in range(max(len(of_rank) for of_rank in shares)):
        results += [of_rank[i] for of_rank in shares if i < len(of_rank)]
    return results


def any_rank(flag: bool) -> bool:
    """True when `flag` is true on at least one rank. Collective.

    A process that has joined no world is one of its own.
    """
    if not dist.is_initialized():
        return flag
    value = torch.tensor(int(flag), device=device())
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return bool(value.item())


def from_rank_0[T](work: Callable[[], T]) -> T:
    """The result or the exception of `work`, which rank 0 alone does, on every rank. Collective.

    Both must be picklable.
    """
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = work()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    result, failure = outcome
    if failure is not None:
        raise failure
    return result
