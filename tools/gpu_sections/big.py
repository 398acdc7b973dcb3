"""More than 2**31 logits, where an index of 32 bits would wrap."""

from collections.abc import Iterator

import torch

from megatron_opd.vocab_parallel import kernels, logprobs
from megatron_opd.vocab_parallel.shards import Shard
from tools.gpu_sections.machine import Machine
from tools.gpu_sections.rows import Row, below, deviation, exactly, measured, skipped
from tools.gpu_sections.vocabulary import VALUES, kernels_on, rounding


def check(machine: Machine) -> Iterator[Row]:
    """The rows before, at and behind the place, and the first and the last, against float64."""
    tokens, vocab = machine.sized((10, 9000), (16384, 151936))
    if reason := machine.lacks(2.5 * 2 * tokens * vocab):
        yield skipped(f"{tokens} x {vocab}", reason)
        return
    logits_TV = machine.normal(tokens, vocab, seed=5, std=4)
    ids_TK = machine.ids(vocab, tokens, 2, seed=5)
    middle = min(tokens - 2, 2**31 // vocab)
    rows = sorted({0, 1, middle - 1, middle, middle + 1, tokens - 2, tokens - 1})
    kept = logits_TV[rows].double().requires_grad_()
    yield measured("logits", tokens * vocab, "" if machine.small else "2**31 and more")

    best = kernels.best(logits_TV, 2, Shard(0, vocab, vocab), 1.0)[1][rows]
    wanted_best = kept.detach().sort(dim=1, descending=True, stable=True).indices[:, :2]
    yield exactly("best two of rows around 2**31: wrong", int((best != wanted_best).sum()), 0)
    leaf = logits_TV.requires_grad_()
    with kernels_on(machine):
        out_TK = logprobs(leaf, ids_TK, None, reuse_logits_for_grad=True)
        assert isinstance(out_TK, torch.Tensor)
        out_TK.sum().backward()
    wanted = torch.log_softmax(kept, 1).gather(1, ids_TK[rows])
    wanted.sum().backward()
    assert leaf.grad is not None and kept.grad is not None
    yield below("log-probabilities of rows around 2**31", deviation(out_TK[rows], wanted), VALUES)
    yield below(
        "their gradients, in place",
        deviation(leaf.grad[rows], kept.grad),
        rounding(machine, leaf.dtype),
    )
