"""What a vocabulary shard knows of its tokens, and how shards become one distribution.

With z the logits over the temperature, a shard holds per token its maximum m_r, the sum s_r of
exp(z - m_r), the sum d_r of exp(z - m_r) (z - m_r), and z at the ids that lie on it. With m the
maximum over the shards,

    s = sum_r s_r exp(m_r - m)        d = sum_r exp(m_r - m) (d_r + s_r (m_r - m))
    log p(id) = z_id - m - log s      H = log s - d / s

so one maximum and one sum over the group make every result, and the backward pass needs no
communication.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None


@dataclass(frozen=True)
class Shard:
    """Which ids this rank holds."""

    first_id: int
    width: int  # columns of the logits
    valid: int  # columns that are tokens; those from here on have probability 0

    @staticmethod
    def of(width: int, group: Group, valid_vocab_size: int | None) -> "Shard":
        first = 0 if group is None else group.rank() * width
        valid = width if valid_vocab_size is None else min(max(valid_vocab_size - first, 0), width)
        return Shard(first, width, valid)

    def columns(self, ids_TK: Tensor) -> tuple[Tensor, Tensor]:
        """The ids as columns of this shard (0 where they are not), and which of them it holds as
        tokens."""
        columns_TK = ids_TK - self.first_id
        here_TK = (columns_TK >= 0) & (columns_TK < self.valid) & (ids_TK >= 0)
        return columns_TK.where(here_TK, 0), here_TK


@dataclass(frozen=True)
class Statistics:
    """A shard's share of the softmax, per token; float32, or float64 of float64 logits."""

    max_T: Tensor
    sum_T: Tensor  # of exp(z - max)
    dot_T: Tensor  # of exp(z - max) (z - max); zeros when no entropy is asked for
    at_TK: Tensor  # z at the ids the shard holds; 0 elsewhere

    @staticmethod
    def empty(tokens: int, ids: int, like: Tensor) -> "Statistics":
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        new = lambda *shape: torch.zeros(shape, dtype=dtype, device=like.device)  # noqa: E731
        return Statistics(
            torch.full_like(new(tokens), -torch.inf), new(tokens), new(tokens), new(tokens, ids)
        )

    @staticmethod
    def joined(parts: Sequence["Statistics"]) -> "Statistics":
        """The statistics of several pieces of tokens, one after the other."""
        columns = zip(*((p.max_T, p.sum_T, p.dot_T, p.at_TK) for p in parts), strict=True)
        return Statistics(*(torch.cat(column) for column in columns))


@dataclass(frozen=True)
class Distribution:
    """Results over the whole vocabulary, equal on every rank."""

    lse_T: Tensor  # log of the sum of exp(z)
    logprobs_TK: Tensor
    entropy_T: Tensor


def size(group: Group) -> int:
    return 1 if group is None else group.size()


def combine(
    local: Statistics, ids_TK: Tensor, group: Group, valid_vocab_size: int | None
) -> Distribution:
    """One maximum and one sum over the group."""
    max_T = local.max_T
    if size(group) > 1:
        max_T = max_T.clone()
        dist.all_reduce(max_T, dist.ReduceOp.MAX, group=group)
    sums_TX = rebased(local, max_T)
    if size(group) > 1:
        dist.all_reduce(sums_TX, dist.ReduceOp.SUM, group=group)
    return distribution(max_T, sums_TX, ids_TK, valid_vocab_size)


def rebased(shard: Statistics, max_T: Tensor) -> Tensor:
    """What shards add up once they know the maximum over all: sum, dot, and z at the ids, [..., T,
    2 + K]."""
    absent_T = shard.sum_T == 0  # a shard without tokens of weight has maximum -inf
    shift_T = (shard.max_T - max_T).masked_fill(absent_T, 0.0)
    scale_T = shift_T.exp()
    sum_T, dot_T = shard.sum_T * scale_T, scale_T * (shard.dot_T + shard.sum_T * shift_T)
    return torch.cat([sum_T[..., None], dot_T[..., None], shard.at_TK], dim=-1)


def distribution(
    max_T: Tensor, sums_TX: Tensor, ids_TK: Tensor, valid_vocab_size: int | None
) -> Distribution:
    """The whole vocabulary's, from the maximum and the sum over the shards of what `rebased`
    gives."""
    log_sum_T = sums_TX[:, 0].log()
    logprobs_TK = (sums_TX[:, 2:] - max_T[:, None] - log_sum_T[:, None]).masked_fill(
        ids_TK < 0, 0.0
    )
    if valid_vocab_size is not None:
        logprobs_TK = logprobs_TK.masked_fill(ids_TK >= valid_vocab_size, -torch.inf)
    return Distribution(max_T + log_sum_T, logprobs_TK, log_sum_T - sums_TX[:, 1] / sums_TX[:, 0])
