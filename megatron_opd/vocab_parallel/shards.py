"""The statistics of a vocabulary shard, and how shards become one distribution.

With z the logits over the temperature, shard r has for each token its maximum m_r, the sum s_r of
exp(z - m_r), the sum d_r of exp(z - m_r) (z - m_r), and z at its own ids. With m the maximum over
the shards,

    s = sum_r s_r exp(m_r - m)        d = sum_r exp(m_r - m) (d_r + s_r (m_r - m))
    log p(id) = z_id - m - log s      H = log s - d / s

so one maximum and one sum over the group make every result, and the backward pass needs no
communication.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None


@dataclass(frozen=True)
class Shard:
    """The ids of this rank."""

    first_id: int
    width: int  # columns of the logits
    valid: int  # columns that are tokens; the others, behind them, have probability 0

    @staticmethod
    def of(width: int, group: Group, valid_vocab_size: int | None) -> "Shard":
        """This rank's shard of a vocabulary; every rank of the group has `width` columns."""
        first = 0 if group is None else group.rank() * width
        valid = width if valid_vocab_size is None else min(max(valid_vocab_size - first, 0), width)
        return Shard(first, width, valid)

    def columns(self, ids_TK: Tensor) -> tuple[Tensor, Tensor]:
        """The ids as columns of this shard, and a mask of the ids that are its tokens.

        The column of another shard's id is 0.
        """
        columns_TK = ids_TK - self.first_id
        here_TK = (columns_TK >= 0) & (columns_TK < self.valid) & (ids_TK >= 0)
        return columns_TK.where(here_TK, 0), here_TK


@dataclass(frozen=True)
class Statistics:
    """Sums over a shard for each token: float32, or float64 for float64 logits."""

    max_T: Tensor
    sum_T: Tensor  # of exp(z - max)
    dot_T: Tensor  # of exp(z - max) (z - max); zeros if no entropy is asked for
    at_TK: Tensor  # z at the shard's own ids; 0 at others

    @staticmethod
    def empty(tokens: int, ids: int, like: Tensor) -> "Statistics":
        """The statistics of a shard without tokens, on the device of `like`."""
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        zeros = partial(torch.zeros, dtype=dtype, device=like.device)
        max_T = torch.full_like(zeros(tokens), -torch.inf)
        return Statistics(max_T, zeros(tokens), zeros(tokens), zeros(tokens, ids))

    @staticmethod
    def joined(stretches: Sequence["Statistics"]) -> "Statistics":
        """The statistics of several stretches of tokens, one after the other."""
        return Statistics(
            torch.cat([stretch.max_T for stretch in stretches]),
            torch.cat([stretch.sum_T for stretch in stretches]),
            torch.cat([stretch.dot_T for stretch in stretches]),
            torch.cat([stretch.at_TK for stretch in stretches]),
        )


@dataclass(frozen=True)
class Distribution:
    """Results over the whole vocabulary, equal on every rank."""

    lse_T: Tensor  # log of the sum of exp(z)
    logprobs_TK: Tensor
    entropy_T: Tensor


def size(group: Group) -> int:
    """The number of ranks of a group."""
    return 1 if group is None else group.size()


def combine(
    local: Statistics, ids_TK: Tensor, group: Group, valid_vocab_size: int | None
) -> Distribution:
    """The distribution over the whole vocabulary: one maximum and one sum over the group."""
    max_T = local.max_T
    if size(group) > 1:
        max_T = max_T.clone()
        dist.all_reduce(max_T, dist.ReduceOp.MAX, group=group)
    sums_TX = rebased(local, max_T)
    if size(group) > 1:
        dist.all_reduce(sums_TX, dist.ReduceOp.SUM, group=group)
    return distribution(max_T, sums_TX, ids_TK, valid_vocab_size)


def rebased(shard: Statistics, max_T: Tensor) -> Tensor:
    """A shard's summands relative to the maximum of all, [..., T, 2 + K]: sum, dot, z at ids."""
    absent_T = shard.sum_T == 0  # a shard without tokens of weight has maximum -inf
    shift_T = (shard.max_T - max_T).masked_fill(absent_T, 0.0)
    scale_T = shift_T.exp()
    sum_T = shard.sum_T * scale_T
    dot_T = scale_T * (shard.dot_T + shard.sum_T * shift_T)
    return torch.cat([sum_T[..., None], dot_T[..., None], shard.at_TK], dim=-1)


def distribution(
    max_T: Tensor, sums_TX: Tensor, ids_TK: Tensor, valid_vocab_size: int | None
) -> Distribution:
    """The distribution over the whole vocabulary.

    `max_T` is the maximum over the shards, `sums_TX` the sum of their `rebased` summands.
    """
    log_sum_T = sums_TX[:, 0].log()
    logprobs_TK = sums_TX[:, 2:] - max_T[:, None] - log_sum_T[:, None]
    logprobs_TK = logprobs_TK.masked_fill(ids_TK < 0, 0.0)
    if valid_vocab_size is not None:
        logprobs_TK = logprobs_TK.masked_fill(ids_TK >= valid_vocab_size, -torch.inf)
    return Distribution(max_T + log_sum_T, logprobs_TK, log_sum_T - sums_TX[:, 1] / sums_TX[:, 0])
