"""The Triton passes over the logits: against float64, against the host's own passes, and the best
columns of a row."""

import math
import os
from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_opd.vocab_parallel import blocks, kernels
from megatron_opd.vocab_parallel.shards import Shard
from tools.gpu_sections.machine import Machine
from tools.gpu_sections.rows import Row, below, deviation, exactly, measured
from tools.gpu_sections.vocabulary import DTYPES, VALUES, kernels_on, rounding, with_gradient

# K, temperature, in place
CASES = ((1, 1.0, False), (1, 0.7, True), (2, 1.0, True), (66, 1.0, True))


def check(machine: Machine) -> Iterator[Row]:
    seed = machine.sized(0, int.from_bytes(os.urandom(3), "little"))
    yield measured("the seed of this run", seed)
    with kernels_on(machine):
        for tokens, vocab, valid in machine.sized(
            [(3, 9000, 8500)], [(256, 151936, 151936), (333, 152064, 151643), (64, 50257, 50000)]
        ):
            for dtype in DTYPES:
                logits_TV = machine.normal(tokens, vocab, dtype=dtype, seed=seed, std=4)
                logits_TV[0, :7] = -math.inf
                yield from _against_float64(machine, logits_TV, valid, seed)
                yield from _best(machine, logits_TV, valid)
                seed += 1
    yield from _against_host(machine)


def _against_float64(machine: Machine, logits_TV: Tensor, valid: int, seed: int) -> Iterator[Row]:
    """Of the same inputs, so that what is left is the rounding of the passes and of what they
    write."""
    tokens, vocab = logits_TV.shape
    for k, temperature, in_place in CASES:
        ids_TK = machine.ids(vocab, tokens, k, lowest=-1, seed=seed)  # -1: no target
        if k > 2:
            ids_TK[:, 1] = ids_TK[:, 0]  # the same id twice
        of = {"temperature": temperature, "valid": valid}
        got = with_gradient(logits_TV, ids_TK, seed, **of, in_place=in_place)  # type: ignore[arg-type]
        want = with_gradient(logits_TV.double(), ids_TK, seed, **of)  # type: ignore[arg-type]
        name = f"{tokens} x {vocab}, {_name(logits_TV)}, K {k}, T {temperature}"
        name += ", in place" if in_place else ""
        yield below(
            f"{name}: values", max(deviation(got[0], want[0]), deviation(got[1], want[1])), VALUES
        )
        yield below(
            f"{name}: gradient", deviation(got[2], want[2]), rounding(machine, logits_TV.dtype)
        )


def _best(machine: Machine, logits_TV: Tensor, valid: int) -> Iterator[Row]:
    """The ids of the largest logits, equal ones in order of the id, and their values as torch.topk
    gives them."""
    tokens, vocab = logits_TV.shape
    tied_TV = logits_TV.round()
    tied_TV[-1] = torch.where(machine.ids(2, vocab) == 0, -0.0, 0.0).to(logits_TV.dtype)
    for kind, values_TV in (("distinct", logits_TV), ("ties", tied_TV)):
        own_TV = values_TV[:, :valid].float() + 0.0
        order_TV = own_TV.sort(dim=1, descending=True, stable=True).indices
        for k in (1, 64):
            got = kernels.best(values_TV, k, Shard(0, vocab, valid), 1.0)
            wrong = int((got[1] != order_TV[:, :k]).sum()) + int(
                (got[0] != own_TV.topk(k, dim=1).values).sum()
            )
            yield exactly(
                f"best {k} of {tokens} x {vocab}, {_name(logits_TV)}, {kind}: wrong", wrong, 0
            )


def _against_host(machine: Machine) -> Iterator[Row]:
    """Logits of 1e4 show a bit of the division: torch rounds it right on the host, and the kernels
    must."""
    tokens, vocab, k, temperature = machine.sized(4, 64), 9000, 3, 1.3
    for dtype in DTYPES:
        logits_TV = machine.normal(tokens, vocab, dtype=dtype, std=5)
        logits_TV[: tokens // 2, :2] = 1e4
        ids_TK = machine.ids(vocab, tokens, k)
        ids_TK[:, 0] = 0
        got = _passes(kernels, logits_TV, ids_TK, temperature)
        want = _passes(blocks, logits_TV.cpu(), ids_TK.cpu(), temperature)
        differ = int((got[0].cpu() != want[0]).sum())
        yield exactly(
            f"host's passes, {_name(logits_TV)}, logits of 1e4 at T {temperature}: other quotients",
            differ,
            0,
        )
        yield below(f"host's passes, {_name(logits_TV)}: sums", deviation(got[1], want[1]), 1e-5)
        yield below(
            f"host's passes, {_name(logits_TV)}: gradient",
            deviation(got[2], want[2]),
            rounding(machine, dtype),
        )


def _passes(
    passes, logits_TV: Tensor, ids_TK: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(z at the ids, sums of exponentials, gradient in place) of one shard."""
    shard = Shard(0, logits_TV.shape[1], logits_TV.shape[1])
    columns_TK, here_TK = shard.columns(ids_TK)
    of = (columns_TK, here_TK, shard, temperature)
    found = passes.statistics(logits_TV, *of, with_entropy=True)
    grads_TK = torch.linspace(-1, 1, ids_TK.numel()).view_as(ids_TK).to(found.sum_T)
    entropy = (
        found.sum_T.log() - found.dot_T / found.sum_T,
        torch.linspace(1, 2, len(logits_TV)).to(found.sum_T),
    )
    out_TV = logits_TV.clone()
    passes.gradient(out_TV, out_TV, *of, found.max_T + found.sum_T.log(), grads_TK, entropy)
    return found.at_TK, found.sum_T, out_TV


def _name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
