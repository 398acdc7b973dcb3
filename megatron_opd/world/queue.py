"""Work that the processes of a world take as they have room for it."""

from collections.abc import Iterator, Sequence

import torch.distributed as dist


def shared_items[T](name: str, items: Sequence[T]) -> Iterator[T]:
    """The items, which every process of the world holds, each for the first process that asks.

    `name` is of this queue alone.
    """
    store = dist.PrefixStore("queue", dist.distributed_c10d._get_default_store())
    while (number := store.add(name, 1) - 1) < len(items):
        yield items[number]
