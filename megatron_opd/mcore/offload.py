"""Frozen weights that wait in host memory while the device is another model's."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch.nn import Module


class HostWeights:
    """The parameters of `chunks`, off the device but within `on_device()`. They do not change:
    nothing is copied back.

    On the host itself there is nothing to move, and the same memory serves.
    """

    def __init__(self, chunks: Sequence[Module], device: torch.device) -> None:
        self._device = device
        self._held = []
        for parameter in (each for chunk in chunks for each in chunk.parameters()):
            host = parameter.detach().cpu()
            self._held.append((parameter, host.pin_memory() if device.type == "cuda" else host))
        self._release()

    @contextlib.contextmanager
    def on_device(self) -> Iterator[None]:
        for parameter, host in self._held:
            parameter.data = host.to(self._device, non_blocking=True)
        try:
            yield
        finally:
            self._release()

    def _release(self) -> None:
        for parameter, host in self._held:
            parameter.data = torch.empty(0, dtype=host.dtype, device=self._device)
