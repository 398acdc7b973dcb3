"""Counts the bytes of tensor storages that are alive, operation by operation."""

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """`peak`: the most bytes alive at once in storages made inside the mode, transient buffers of a
    kernel apart.

    Tensors on the meta device have no bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self._known: set[int] = set()
        self.peak = 0

    def ignore(self, *tensors: torch.Tensor) -> None:
        """Do not count what the caller holds."""
        self._known |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        self._storages = {
            key: kept for key, kept in self._storages.items() if not kept[0].expired()
        }
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self._known and storage.device.type != "meta":
                    self._storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self._storages.values()))
        return result
