"""Tensors on their way into an engine."""

from collections.abc import Iterable, Iterator

import torch

from megatron_opd.errors import RunError


class Delivery:
    """Hands vLLM the tensors it knows, and keeps the first problem for `check`.

    An exception inside vLLM's loaders would leave layers without storage.
    """

    def __init__(
        self, named_tensors: Iterable[tuple[str, torch.Tensor]], shapes: dict[str, tuple[int, ...]]
    ) -> None:
        self._source = named_tensors
        self._shapes = shapes
        self._arrived: set[str] = set()
        self._problem: Exception | None = None
        self._last = "the first tensor"

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        try:
            for name, tensor in self._source:
                self._last = name
                if self._shapes.get(name) == tuple(tensor.shape):
                    self._arrived.add(name)
                    yield name, tensor
                elif self._problem is None:
                    expected = self._shapes.get(name, "no such tensor")
                    self._problem = RunError(
                        f"weights for vLLM: {name} has shape {tuple(tensor.shape)}, {expected=}"
                    )
        except Exception as error:
            self._problem = error

    def progress(self) -> str:
        """The present work, for an error."""
        return f"taking weights, at {self._last}"

    def check(self) -> None:
        """Raises the first problem, or RunError naming a tensor that is missing."""
        if self._problem is not None:
            raise self._problem
        missing = sorted(self._shapes.keys() - self._arrived)
        if missing:
            raise RunError(
                f"weights for vLLM: {len(missing)} tensors did not arrive, first {missing[0]}"
            )
