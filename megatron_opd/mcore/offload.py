"""Frozen weights that wait in host memory while the device is another model's."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch.nn import Module


class HostWeights:
    """The parameters of `chunks`, which are on the device only within `on_device()`.

    They do not change, so nothing is copied back. If the device is the host, nothing moves, and the
    same memory serves.
    """

    def __init__(self, chunks: Sequence[Module], device: torch.device) -> None:
        self._device = device
        self._parameters = []
        for chunk in chunks:
            for parameter in chunk.parameters():
                host = parameter.detach().cpu()
                if device.type == "cuda":
                    host = host.pin_memory()
                self._parameters.append((parameter, host))
        self._release()

    @contextlib.contextmanager
    def on_device(self) -> Iterator[None]:
        """Brings the weights to the device, and frees its memory at the end."""
        for parameter, host in self._parameters:
            parameter.data = host.to(self._device, non_blocking=True)
        try:
            yield
        finally:
            self._release()

    def _release(self) -> None:
        for parameter, host in self._parameters:
            parameter.data = torch.empty(0, dtype=host.dtype, device=self._device)
