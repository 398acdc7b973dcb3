"""New weights into the rollout engine, every tensor verified.

While a tensor streams past, the sender multiplies it with a few probe vectors; afterwards the engine multiplies what it
holds with the same vectors, through its own kernels where they keep the weight in a form of their own. Unit vectors
read whole columns of the weight, exactly in any dtype, so that a tensor one update old does not pass; a vector of signs
covers the columns between them, up to rounding. Other columns are read at every version.
"""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional

from megatron_opd.errors import RunError

_COLUMNS = 3
_ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # relative to the largest product


class Engine(Protocol):
    """What a push needs of the rollout engine."""

    dtype: torch.dtype
    policy_version: int | None

    def reload(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None: ...

    def project(self, name: str, probes_KI: torch.Tensor) -> list[torch.Tensor]: ...


@dataclass(frozen=True)
class RefitReport:
    seconds: float
    tensors: int
    bytes: int  # of the tensors sent, in the engine's dtype
    max_error: float  # the largest deviation of a product, relative to the tensor's largest; rounding only


def push(named_tensors: Iterator[tuple[str, torch.Tensor]], engine: Engine, version: int) -> RefitReport:
    """Streams (Hugging Face name, full tensor) into the engine, which then holds policy `version`.

    `named_tensors` may be a collective over the trainer's ranks: it is read to its end whatever happens to the engine.
    Raises RunError naming the first tensor that is missing, unknown, or not in the engine what was sent.
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
    """`probes @ tensor.T`, float32 [K, O], and the probes."""

    probes_KI: torch.Tensor
    products_KO: torch.Tensor


def _project(tensor: torch.Tensor, version: int) -> _Products:
    matrix_OI = tensor.reshape(tensor.shape[0], -1)
    probes_KI = _probes(matrix_OI.shape[1], version).to(tensor.device)
    return _Products(probes_KI, functional.linear(probes_KI, matrix_OI.float()))


def _probes(width: int, version: int) -> torch.Tensor:
    """`_COLUMNS` unit vectors, spread over the width and shifted with the version, then one of random signs [K, I]."""
    if width == 1:
        return torch.ones(1, 1)
    probes_KI = torch.zeros(_COLUMNS + 1, width)
    for row in range(_COLUMNS):
        probes_KI[row, (row * width // _COLUMNS + version) % width] = 1
    bits = torch.randint(2, (width,), generator=torch.Generator().manual_seed(width))
    probes_KI[-1] = 2 * bits - 1
    return probes_KI


def _verify(name: str, sent: _Products, engine: Engine) -> float:
    """The deviation of the engine's products, relative to the largest of them."""
    error = 0.0
    for held_KO in engine.project(name, sent.probes_KI):
        exact = min(len(held_KO), _COLUMNS)
        deviation = (held_KO - sent.products_KO).abs().max() / sent.products_KO.abs().max().clamp(min=1e-30)
        if not (torch.equal(held_KO[:exact], sent.products_KO[:exact]) and deviation <= _ROUNDING[engine.dtype]):
            raise RunError(
                f"refit: {name} in vLLM is not the tensor that was sent (relative deviation {deviation.item():.2g})"
            )
        error = max(error, deviation.item())
    return error
