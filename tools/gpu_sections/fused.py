"""The output layer fused into the loss: values, gradients of hidden states and weight, the
teacher's signals."""

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_opd.vocab_parallel import linear_logprobs, linear_topk, logprobs, topk
from tools.gpu_sections.machine import Machine
from tools.gpu_sections.rows import Row, below, deviation, exactly
from tools.gpu_sections.vocabulary import VALUES, kernels_on

# Of gradients that went through logits' gradients in this dtype, and of the hidden states' also
# through their own.
ROUNDING = {torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 4e-3}


def check(machine: Machine) -> Iterator[Row]:
    """In several slabs, the last one shorter, so that the weight's gradient is added up inside of
    products."""
    tokens, vocab, width = machine.sized((10, 1000, 64), (1000, 50257, 1024))
    slab = machine.sized(4, 384)
    for dtype in ROUNDING:
        hidden_TD = machine.normal(tokens, width, dtype=dtype)
        weight_VD = machine.normal(vocab, width, dtype=dtype, seed=1, std=2 / width**0.5)
        ids_TK = machine.ids(vocab, tokens, 2, seed=2)
        with kernels_on(machine):
            yield from _student(hidden_TD, weight_VD, ids_TK, slab)
            yield from _teacher(hidden_TD, weight_VD, ids_TK, slab)


def _student(hidden_TD: Tensor, weight_VD: Tensor, ids_TK: Tensor, slab: int) -> Iterator[Row]:
    """Against float64 on the same rounded logits: what is left is the rounding of the gradients."""
    name = str(hidden_TD.dtype).removeprefix("torch.")
    leaves = hidden_TD.clone().requires_grad_(), weight_VD.clone().requires_grad_()
    hidden, weight = leaves
    out_TK, entropy_T = linear_logprobs(
        hidden, weight, ids_TK, None, with_entropy=True, slab_tokens=slab
    )
    (out_TK.sum() + entropy_T.sum()).backward()

    logits_TV = _rounded(hidden_TD, weight_VD, slab).double().requires_grad_()
    wanted_TK, wanted_T = logprobs(logits_TV, ids_TK, None, with_entropy=True)
    (wanted_TK.sum() + wanted_T.sum()).backward()
    assert logits_TV.grad is not None
    grads = logits_TV.grad @ weight_VD.double(), logits_TV.grad.T @ hidden_TD.double()
    yield below(
        f"{name}: values", max(deviation(out_TK, wanted_TK), deviation(entropy_T, wanted_T)), VALUES
    )
    for what, leaf, wanted in zip(
        ("hidden states", "weight, over chunks"), leaves, grads, strict=True
    ):
        assert leaf.grad is not None
        yield below(
            f"{name}: gradient of the {what}",
            deviation(leaf.grad, wanted),
            ROUNDING[hidden_TD.dtype],
        )


def _teacher(hidden_TD: Tensor, weight_VD: Tensor, ids_TK: Tensor, slab: int) -> Iterator[Row]:
    name, k = str(hidden_TD.dtype).removeprefix("torch."), 64
    got = linear_topk(hidden_TD, weight_VD, k, None, ids_TJ=ids_TK, slab_tokens=slab)
    wanted = topk(_rounded(hidden_TD, weight_VD, slab).double(), k, None, ids_TJ=ids_TK)
    yield exactly(
        f"{name}: top {k} of the teacher, wrong ids", int((got.ids_TK != wanted.ids_TK).sum()), 0
    )
    largest = max(deviation(*pair) for pair in zip(got[1:], wanted[1:], strict=True))
    yield below(f"{name}: its log-probabilities and entropy", largest, VALUES)


def _rounded(hidden_TD: Tensor, weight_VD: Tensor, slab: int) -> Tensor:
    """Logits of the same products as the op's, slab by slab."""
    return torch.cat([rows @ weight_VD.T for rows in hidden_TD.split(slab)])
