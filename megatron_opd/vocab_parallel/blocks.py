"""One pass over a shard's logits in blocks that fit a cache, in torch, on any device.

A block is a tile of tokens x vocabulary. It is copied into a float32 buffer, which is in cache for
every further operation on it. The only tensors of size [T, V] are the caller's logits and, in the
backward pass, their gradient. Nothing here communicates.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_opd.vocab_parallel.shards import Shard, Statistics

# 4 MiB of float32 fit a usual last-level cache, and take long compared with the cost of a call.
BLOCK_ELEMENTS = 2**20
# On CUDA a call costs as much, and a number a hundredth.
CUDA_BLOCK_ELEMENTS = 2**24
FINITE = -1e25  # in the place of -inf, so that 0 times it is 0


def statistics(
    logits_TV: Tensor,
    columns_TK: Tensor,
    here_TK: Tensor,
    shard: Shard,
    temperature: float,
    *,
    with_entropy: bool,
) -> Statistics:
    """The statistics of a shard's logits; `columns_TK` and `here_TK` are from `Shard.columns`."""
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
        base_B = max_B.masked_fill(max_B == -torch.inf, 0.0)
        z = torch.sub(z, base_B[:, None], out=scratch.buffer(rows, 0))
        # Without entropy there is one buffer, and the exponentials overwrite z.
        exp = torch.exp(z, out=scratch.buffer(rows, -1))
        torch.sum(exp, dim=1, out=out.sum_T[rows])
        if with_entropy:
            out.dot_T[rows] = _dot(exp, z)
    return out


def _dot(exp: Tensor, z: Tensor) -> Tensor:
    """Row sums of exp * z, in which a token of probability 0 counts nothing, even if z is -inf."""
    dot_B = torch.linalg.vecdot(exp, z)
    if dot_B.isnan().any():  # 0 times -inf, or a true NaN, which stays one
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
    """Writes the gradient of sum_k grad_k log p(id_k) + grad_H H by the logits into `out_TV`.

    `out_TV` may be `logits_TV` itself. `entropy` is (H, grad_H), both [T]. The derivative is
    d/dz_v = sum_k grad_k [id_k = v] - p_v (sum_k grad_k + grad_H (log p_v + H)).
    """
    total_T = grad_TK.sum(dim=1)
    own_grad_TK = grad_TK * here_TK
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
            entropy_T, entropy_grad_T = entropy
            entropy_B1 = entropy_T[rows, None]
            weight_B1 = entropy_grad_T[rows, None]
            shift_B1 = -total_T[rows, None] - weight_B1 * entropy_B1
            grad = log_p.clamp_(min=FINITE).mul_(-weight_B1).add_(shift_B1).mul_(p)
        grad.scatter_add_(1, columns_TK[rows], own_grad_TK[rows])
        if temperature != 1.0:
            grad.div_(temperature)
        if not in_place:
            target.copy_(grad)


def best(logits_TV: Tensor, k: int, shard: Shard, temperature: float) -> tuple[Tensor, Tensor]:
    """The k largest z of each row and their global ids, [T, k]; equal values in order of the id.

    A shard of fewer than k tokens gives as many as it has.
    """
    k = min(k, shard.valid)
    values_TK = Statistics.empty(len(logits_TV), k, logits_TV).at_TK
    ids_TK = torch.zeros((len(logits_TV), k), dtype=torch.long, device=logits_TV.device)
    if k == 0:
        return values_TK, ids_TK
    for rows, z in blocks_of(logits_TV, shard, temperature, values_TK.dtype):
        values, columns = z.topk(k, dim=1)
        # Of equal values, topk takes any, in any order.
        tied = (z >= values[:, -1:]).sum(dim=1) > k
        if tied.any():
            ordered = z[tied].sort(dim=1, descending=True, stable=True)
            values[tied] = ordered.values[:, :k]
            columns[tied] = ordered.indices[:, :k]
        values_TK[rows], ids_TK[rows] = by_value_then_id(values, columns)
    return values_TK, ids_TK + shard.first_id


def by_value_then_id(values_TK: Tensor, ids_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Values and ids of each row, the largest value first, equal ones in order of the id."""
    ids_TK, order_TK = ids_TK.sort(dim=1)
    values_TK, by_value_TK = values_TK.gather(1, order_TK).sort(dim=1, descending=True, stable=True)
    return values_TK, ids_TK.gather(1, by_value_TK)


def blocks_of(
    logits_TV: Tensor, shard: Shard, temperature: float, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """Yields the rows of a block and a float copy of their logits over the temperature.

    The copy has no padding columns, and is valid until the next one: all use one buffer.
    """
    scratch = _Scratch(logits_TV, shard, dtype, buffers=1)
    for rows in scratch.blocks():
        yield rows, scratch.buffer(rows, 0).copy_(scratch.logits(rows, temperature))


class _Scratch:
    """Buffers of one block, made once: the allocator would fetch new pages for every block."""

    def __init__(
        self, logits_TV: Tensor, shard: Shard, dtype: torch.dtype, *, buffers: int
    ) -> None:
        self.logits_TV = logits_TV
        self.valid = shard.valid
        self.dtype = dtype
        elements = CUDA_BLOCK_ELEMENTS if logits_TV.is_cuda else BLOCK_ELEMENTS
        self.rows = max(1, min(elements // shard.valid, len(logits_TV)))
        self.buffers = logits_TV.new_empty((buffers, self.rows, shard.valid), dtype=dtype)

    def blocks(self) -> Iterator[slice]:
        """The rows of every block."""
        tokens = len(self.logits_TV)
        for start in range(0, tokens, self.rows):
            yield slice(start, min(start + self.rows, tokens))

    def buffer(self, rows: slice, index: int) -> Tensor:
        return self.buffers[index, : rows.stop - rows.start]

    def logits(self, rows: slice, temperature: float) -> Tensor:
        """The logits in `dtype` over the temperature: a copy in the first buffer if they change."""
        logits = self.logits_TV[rows, : self.valid]
        if logits.dtype == self.dtype and temperature == 1.0:
            return logits
        copy = self.buffer(rows, 0).copy_(logits)
        return copy if temperature == 1.0 else copy.div_(temperature)
