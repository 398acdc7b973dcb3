"""Work that the processes of a world take as they have room for it."""

import itertools
from collections.abc import Iterator

import torch.distributed as dist


def shared_numbers(name: str) -> Iterator[int]:
    """0, 1, 2, ... without end, every number for one process of the world: the first that asks.

    `name` is of this queue alone. A process that has joined no world is one of its own.
    """
    if not dist.is_initialized():
        yield from itertools.count()
        return
    store = dist.PrefixStore("queue", dist.distributed_c10d._get_default_store())
    while True:
        yield store.add(name, 1) - 1


def shared_items[T](name: str, items: list[T]) -> Iterator[T]:
    """The items, which every process holds, each for the first process that asks."""
    for number in shared_numbers(name):
        if number >= len(items):
            return
        yield items[number]
