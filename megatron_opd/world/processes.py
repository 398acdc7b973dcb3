"""The processes of a world: how they start, stop and agree, and what each does of a list.

A world is the processes of one role; it has a default process group of its own.
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
    """Chooses the device and joins the default process group (of one process when torchrun did not
    start us).

    `apart`: role -> processes set aside for it, the last ones, in this order. Each role has a
    default group of its own, and a channel joins it to the processes that are left, the student's.
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
    """The student's processes are the first, so that the rank whose output people read is 0."""
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
    """Between the student's processes and those of `role`; None where they are the same."""
    return _channels.get(role)


def own_role() -> str | None:
    """What this process is set aside for; None for the student's."""
    return next((role for role, each in _channels.items() if each.serves), None)


_when_stopped: list[Callable[[], None]] = []


def when_stopped(forget: Callable[[], None]) -> None:
    """`forget` drops what somebody keeps of process groups, before `stop` ends them."""
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
    """This rank's part of a list that every rank holds."""
    return items[dist.get_rank() :: dist.get_world_size()]


def gather_shares[T](mine: list[T]) -> list[T]:
    """The inverse of `share` for results made one per item: every rank gets all, in the order of
    the items."""
    parts: list[list[T]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, mine)
    whole: list[T] = []
    for i in range(max(len(part) for part in parts)):
        whole += [part[i] for part in parts if i < len(part)]
    return whole


def any_rank(flag: bool) -> bool:
    """Whether `flag` is true on at least one rank. Collective."""
    value = torch.tensor(int(flag), device=device())
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return bool(value.item())


def from_rank_0[T](work: Callable[[], T]) -> T:
    """What `work`, done by rank 0 alone, returns or raises, on every rank. Collective; it must be
    picklable."""
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
