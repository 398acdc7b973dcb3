"""Sends new weights to the rollout engine, and verifies every tensor there.

While a tensor streams past, the sender multiplies it with a few probe vectors. Afterwards the
engine multiplies its own weight with the same vectors, through its own kernels if these keep the
weight in a form of their own.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from megatron_opd.contracts.stations import Engine, Probes, RefitReport
from megatron_opd.errors import RunError
from megatron_opd.weights.probes import make_probes, project

# The largest deviation that is rounding, relative to the largest product.
_ROUNDING = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


class Refit:
    """Sends the weights of one model to one engine; `tensors` streams the weights for `push`."""

    def __init__(
        self, tensors: Callable[[], Iterator[tuple[str, torch.Tensor]]], engine: Engine
    ) -> None:
        self._tensors = tensors
        self._engine = engine

    def send(self, version: int) -> RefitReport:
        """Sends the present weights as policy `version`: see `WeightSender.send`."""
        return push(self._tensors(), self._engine, version)


def push(
    named_tensors: Iterator[tuple[str, torch.Tensor]], engine: Engine, version: int
) -> RefitReport:
    """Streams whole tensors by their Hugging Face names into the engine: policy `version`.

    `named_tensors` may be a collective over the trainer's ranks, so it is read to its end even if
    the engine fails. Raises RunError naming the first tensor that is missing or unknown, or differs
    in the engine.
    """
    start = time.perf_counter()
    sent: dict[str, _Products] = {}
    num_bytes = 0

    def probed() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal num_bytes
        for name, tensor in named_tensors:
            tensor = tensor.detach().to(engine.dtype)
            sent[name] = _project(tensor, version)
            num_bytes += tensor.nbytes
            yield name, tensor

    try:
        engine.reload(probed())
    finally:
        for _ in named_tensors:  # the other ranks wait in its collectives
            pass
    max_error = max(_verify(name, products, engine) for name, products in sent.items())
    engine.policy_version = version
    return RefitReport(time.perf_counter() - start, len(sent), num_bytes, max_error)


@dataclass(frozen=True)
class _Products:
    """The products of a tensor with its probes, made when it was sent."""

    probes: Probes
    products_KO: torch.Tensor  # float32


def _project(tensor: torch.Tensor, version: int) -> _Products:
    matrix_OI = tensor.reshape(tensor.shape[0], -1)
    probes = make_probes(matrix_OI.shape[1], version, tensor.device)
    return _Products(probes, project(probes, matrix_OI))


def _verify(name: str, sent: _Products, engine: Engine) -> float:
    """The deviation of the engine's products, relative to the largest of them."""
    error = 0.0
    exact = sent.probes.exact
    largest = sent.products_KO.abs().max().clamp(min=1e-30)
    for products_KO in engine.project(name, sent.probes):
        deviation = (products_KO - sent.products_KO).abs().max() / largest
        same_columns = torch.equal(products_KO[:exact], sent.products_KO[:exact])
        # A deviation of NaN is not within the limit either.
        if not (same_columns and deviation <= _ROUNDING[engine.dtype]):
            raise RunError(
                f"refit: {name} in vLLM is not the tensor that was sent (relative deviation "
                f"{deviation.item():.2g})"
            )
        error = max(error, deviation.item())
    return error
