"""One pass over a shard's logits in blocks that fit a cache, in torch; on any device.

Nothing here communicates. A block is copied into a float32 scratch, where every further pass finds
it in cache; the only tensors of size [T, V] are the caller's logits and, in the backward pass,
their gradient.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_opd.vocab_parallel.shards import Shard, Statistics

# 4 MiB of float32: fits a usual last-level cache, and is long against the cost of a call
BLOCK_ELEMENTS = 2**20
CUDA_BLOCK_ELEMENTS = 2**24  # a call costs as much there, and a number a hundredth
FINITE = -1e25  # in the place of -inf where it meets a probability of 0


def statistics(
    logits_TV: Tensor,
    columns_TK: Tensor,
    here_TK: Tensor,
    shard: Shard,
    temperature: float,
    *,
    with_entropy: bool,
) -> Statistics:
    """See `Statistics`. `columns_TK` and `here_TK` are from `Shard.columns`."""
    out = Statistics.empty(len(logits_TV), columns_TK.shape[1], logits_TV)
    if shard.valid == 0:
        return out
    scratch = _Scratch(logits_TV, shard, out.sum_T.dtype, buffers=2 if with_entropy else 1)
    for rows in scratch.blocks():
        at = logits_TV[rows].gather(1, columns_TK[rows]).to(out.at_TK.dtype) / temperature
        out.at_TK[rows] = at.masked_fill_(~here_TK[rows], 0.0)
        z = scratch.logits(rows, temperature)
        max_B = z.amax(dim=1)
        out.max_T[rows] = max_B
        z = torch.sub(
            z, max_B.masked_fill(max_B == -torch.inf, 0.0)[:, None], out=scratch.buffer(rows, 0)
        )
        # over z itself when no entropy is asked for
        exp = torch.exp(z, out=scratch.buffer(rows, -1))
        torch.sum(exp, dim=1, out=out.sum_T[rows])
        if with_entropy:
            out.dot_T[rows] = _dot(exp, z)
    return out


def _dot(exp: Tensor, z: Tensor) -> Tensor:
    """Row sums of exp * z; a token of probability 0 contributes nothing, even where its logit is
    -inf."""
    dot_B = torch.linalg.vecdot(exp, z)
    if dot_B.isnan().any():  # 0 times -inf, or a NaN that the second try keeps
        dot_B = exp.mul_(z.clamp_(min=FINITE)).sum(dim=1)
    return dot_B


def gradient(
    logits_TV: Tensor,
    out_TV: Tensor,
    columns_TK: Tensor,
    here_TK: Tensor,
    shard: Shard,
    temperature: float,
    lse_T: Tensor,
    grad_TK: Tensor,
    entropy: tuple[Tensor, Tensor] | None,
) -> None:
    """Writes the gradient of sum_k grad_k log p(id_k) + grad_H H into `out_TV`, which may be
    `logits_TV` itself.

    `entropy` is (H, grad_H), each [T]. d/dz_v = sum_k grad_k [id_k = v] - p_v (sum_k grad_k +
    grad_H (log p_v + H)).
    """
    total_T = grad_TK.sum(dim=1)
    held_TK = grad_TK * here_TK
    out_TV[:, shard.valid :] = 0
    if shard.valid == 0:
        return
    scratch = _Scratch(logits_TV, shard, lse_T.dtype, buffers=1 if entropy is None else 2)
    in_place = out_TV.dtype == lse_T.dtype
    for rows in scratch.blocks():
        target = out_TV[rows, : shard.valid]
        work = target if in_place else scratch.buffer(rows, 0)
        log_p = torch.sub(scratch.logits(rows, temperature), lse_T[rows, None], out=work)
        if entropy is None:
            grad = log_p.exp_().mul_(-total_T[rows, None])
        else:
            p = torch.exp(log_p, out=scratch.buffer(rows, -1))
            entropy_B1, weight_B1 = (each[rows, None] for each in entropy)
            shift_B1 = -total_T[rows, None] - weight_B1 * entropy_B1
            grad = log_p.clamp_(min=FINITE).mul_(-weight_B1).add_(shift_B1).mul_(p)
        grad.scatter_add_(1, columns_TK[rows], held_TK[rows])
        if temperature != 1.0:
            grad.div_(temperature)
        if not in_place:
            target.copy_(grad)


def best(logits_TV: Tensor, k: int, shard: Shard, temperature: float) -> tuple[Tensor, Tensor]:
    """The k largest z of each row and their global ids; equal values in order of the id. Fewer
    where the shard ends."""
    k = min(k, shard.valid)
    values_TK = Statistics.empty(len(logits_TV), k, logits_TV).at_TK
    ids_TK = torch.zeros((len(logits_TV), k), dtype=torch.long, device=logits_TV.device)
    if k == 0:
        return values_TK, ids_TK
    for rows, z in blocks_of(logits_TV, shard, temperature, values_TK.dtype):
        values, columns = z.topk(k, dim=1)
        # topk promises nothing about equal values: which of them it took, and in which order.
        tied = (z >= values[:, -1:]).sum(dim=1) > k
        if tied.any():
            ordered = z[tied].sort(dim=1, descending=True, stable=True)
            values[tied], columns[tied] = ordered.values[:, :k], ordered.indices[:, :k]
        values_TK[rows], ids_TK[rows] = by_value_then_id(values, columns)
    return values_TK, ids_TK + shard.first_id


def by_value_then_id(values_TK: Tensor, ids_TK: Tensor) -> tuple[Tensor, Tensor]:
    ids_TK, order_TK = ids_TK.sort(dim=1)
    values_TK, by_value_TK = values_TK.gather(1, order_TK).sort(dim=1, descending=True, stable=True)
    return values_TK, ids_TK.gather(1, by_value_TK)


def blocks_of(
    logits_TV: Tensor, shard: Shard, temperature: float, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """(rows, a copy of their logits over the temperature without padding columns, in one reused
    buffer)."""
    scratch = _Scratch(logits_TV, shard, dtype, buffers=1)
    for rows in scratch.blocks():
        yield rows, scratch.buffer(rows, 0).copy_(scratch.logits(rows, temperature))


class _Scratch:
    """Buffers of one block, made once: the allocator would fetch fresh pages for every block."""

    def __init__(
        self, logits_TV: Tensor, shard: Shard, dtype: torch.dtype, *, buffers: int
    ) -> None:
        self.logits_TV, self.valid, self.dtype = logits_TV, shard.valid, dtype
        elements = CUDA_BLOCK_ELEMENTS if logits_TV.is_cuda else BLOCK_ELEMENTS
        self.rows = max(1, min(elements // shard.valid, len(logits_TV)))
        self.buffers = logits_TV.new_empty((buffers, self.rows, shard.valid), dtype=dtype)

    def blocks(self) -> Iterator[slice]:
        tokens = len(self.logits_TV)
        return (
            slice(start, min(start + self.rows, tokens)) for start in range(0, tokens, self.rows)
        )

    def buffer(self, rows: slice, index: int) -> Tensor:
        return self.buffers[index, : rows.stop - rows.start]

    def logits(self, rows: slice, temperature: float) -> Tensor:
        """The logits themselves when they need no change, else a changed copy in the first
        buffer."""
        logits = self.logits_TV[rows, : self.valid]
        if logits.dtype == self.dtype and temperature == 1.0:
            return logits
        copy = self.buffer(rows, 0).copy_(logits)
        return copy if temperature == 1.0 else copy.div_(temperature)
