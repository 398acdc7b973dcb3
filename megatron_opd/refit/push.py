"""New weights into the rollout engine, every tensor verified.

While a tensor streams past, the sender multiplies it with a few probe vectors; afterwards the
engine multiplies what it holds with the same vectors, through its own kernels where they keep the
weight in a form of their own.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_opd.contracts.stations import Engine, Probes
from megatron_opd.errors import RunError
from megatron_opd.weights.probes import make_probes, project

# relative to the largest product
_ROUNDING = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class RefitReport:
    seconds: float
    tensors: int
    bytes: int  # of the tensors sent, in the engine's dtype
    # the largest deviation of a product, relative to the tensor's largest; rounding only
    max_error: float


def push(
    named_tensors: Iterator[tuple[str, torch.Tensor]], engine: Engine, version: int
) -> RefitReport:
    """Streams (Hugging Face name, full tensor) into the engine, which then holds policy `version`.

    `named_tensors` may be a collective over the trainer's ranks: it is read to its end whatever
    happens to the engine. Raises RunError naming the first tensor that is missing, unknown, or not
    in the engine what was sent.
    """
    start = time.perf_counter()
    sent: dict[str, _Products] = {}
    num_bytes = 0

    def watched() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal num_bytes
        for name, tensor in named_tensors:
            tensor = tensor.detach().to(engine.dtype)
            sent[name] = _project(tensor, version)
            num_bytes += tensor.nbytes
            yield name, tensor

    try:
        engine.reload(watched())
    finally:
        for _ in named_tensors:  # the other ranks wait in its collectives
            pass
    max_error = max(_verify(name, products, engine) for name, products in sent.items())
    engine.policy_version = version
    return RefitReport(time.perf_counter() - start, len(sent), num_bytes, max_error)


@dataclass(frozen=True)
class _Products:
    """What the probes read of a tensor when it was sent."""

    probes: Probes
    products_KO: torch.Tensor  # float32


def _project(tensor: torch.Tensor, version: int) -> _Products:
    matrix_OI = tensor.reshape(tensor.shape[0], -1)
    probes = make_probes(matrix_OI.shape[1], version, tensor.device)
    return _Products(probes, project(probes, matrix_OI))


def _verify(name: str, sent: _Products, engine: Engine) -> float:
    """The deviation of the engine's products, relative to the largest of them."""
    error, exact = 0.0, sent.probes.exact
    for held_KO in engine.project(name, sent.probes):
        deviation = (held_KO - sent.products_KO).abs().max() / sent.products_KO.abs().max().clamp(
            min=1e-30
        )
        if not (
            torch.equal(held_KO[:exact], sent.products_KO[:exact])
            and deviation <= _ROUNDING[engine.dtype]
        ):
            raise RunError(
                f"refit: {name} in vLLM is not the tensor that was sent (relative deviation "
                f"{deviation.item():.2g})"
            )
        error = max(error, deviation.item())
    return error
