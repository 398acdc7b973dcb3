"""The vocabulary op's results through the compiled kernels, or through Triton's interpreter on the
host."""

import contextlib
from collections.abc import Iterator
from unittest.mock import patch

import torch
from torch import Tensor

from megatron_opd.vocab_parallel import blocks, kernels, linear, logprobs, ops
from tools.gpu_sections.machine import Machine

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VALUES = 2e-6


def rounding(machine: Machine, dtype: torch.dtype) -> float:
    """The largest deviation of a gradient that is rounded to the dtype. Triton's interpreter cuts
    bfloat16 off."""
    bfloat16 = 6e-3 if machine.is_cuda else 8e-3
    return {torch.float32: 1e-5, torch.bfloat16: bfloat16, torch.float16: 1e-3}[dtype]


@contextlib.contextmanager
def kernels_on(machine: Machine) -> Iterator[None]:
    """The op chooses the kernels for CUDA alone: here also for the host's logits, where Triton
    interprets them."""
    if machine.is_cuda:
        yield
        return
    choose = lambda logits_TV: blocks if logits_TV.dtype == torch.float64 else kernels  # noqa: E731
    with patch.object(ops, "passes", choose), patch.object(linear, "passes", choose):
        yield


def with_gradient(
    logits_TV: Tensor,
    ids_TK: Tensor,
    seed: int,
    *,
    temperature: float = 1.0,
    valid: int | None = None,
    in_place: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, entropy, and the gradient of a random combination of both, equal for equal
    seeds."""
    leaf = logits_TV.clone().requires_grad_()
    out_TK, entropy_T = logprobs(
        leaf, ids_TK, None, temperature=temperature, valid_vocab_size=valid, with_entropy=True,
        reuse_logits_for_grad=in_place,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    weights_TK, weights_T = (
        torch.randn(x.shape, generator=generator).to(x) for x in (out_TK, entropy_T)
    )
    loss = (out_TK * weights_TK).where(out_TK.isfinite(), 0.0).sum() + (entropy_T * weights_T).sum()
    loss.backward()
    assert leaf.grad is not None
    return out_TK.detach(), entropy_T.detach(), leaf.grad
