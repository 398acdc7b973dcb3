"""Log-probabilities, entropy and top-k over logits whose vocabulary is split across tensor-parallel ranks.

Rank r of a group of `tp` holds columns [r * V/tp, (r+1) * V/tp) of logits_TV; ids are global. With z the logits
divided by the temperature, m the global maximum and s = sum_v exp(z_v - m):

    log p(id) = z_id - m - log s        H = log s - sum_v p_v (z_v - m)

so a forward pass needs one maximum and one sum over the group, and the backward pass none:

    d/dz_v [sum_k g_k log p(id_k)] = sum_k g_k [id_k = v] - p_v sum_k g_k        dH/dz_v = -p_v (log p_v + H)
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None


class TeacherTopK(NamedTuple):
    """What a frozen model says of its next token; nothing here carries a gradient."""

    ids_TK: Tensor  # int64, the K most likely ids, best first; equal logits in order of the id
    logprobs_TK: Tensor  # float32, of those ids, under the full softmax
    entropy_T: Tensor  # float32, nats, of the full distribution
    logprobs_TJ: Tensor  # float32, of the ids the caller named


def logprobs(
    logits_TV: Tensor,
    ids_TK: Tensor,
    group: Group,
    *,
    temperature: float = 1.0,
    valid_vocab_size: int | None = None,
    with_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probabilities of K ids per token, and the entropy if asked; gradients flow to `logits_TV` through both.

    Args:
        logits_TV: float32, bfloat16 or float16 [T, V/tp], this rank's shard. It is not modified.
        ids_TK: int64 [T, K], global ids; an id below 0 means "no target": logprob 0 and no gradient.
        group: the tensor-parallel group, or None for one rank. Equal arguments but for the shard on every rank.
        temperature: the logits are divided by it first.
        valid_vocab_size: ids from here on (padding, ids the other model lacks) have probability 0.
        with_entropy: return (logprobs_TK, entropy_T).

    Returns:
        logprobs_TK float32 [T, K]; with `with_entropy` also entropy_T float32 [T], in nats. Equal on every rank.

    Raises:
        ValueError: shapes that do not fit, an id at or above the global vocabulary size.
    """
    _check(logits_TV, ids_TK, group)
    out_TK, entropy_T = _Logprobs.apply(logits_TV, ids_TK, group, temperature, valid_vocab_size, with_entropy)
    return (out_TK, entropy_T) if with_entropy else out_TK


@torch.no_grad()
def topk(
    logits_TV: Tensor,
    k: int,
    group: Group,
    *,
    ids_TJ: Tensor | None = None,
    temperature: float = 1.0,
    valid_vocab_size: int | None = None,
) -> TeacherTopK:
    """The k most likely ids with their logprobs, the entropy, and the logprobs of ids the caller names. No gradient.

    Arguments as for `logprobs`; `k` may be 0. Ties go to the lowest id, so that the result does not depend on the
    layout. Raises ValueError when k exceeds the vocabulary.
    """
    ids_TJ = logits_TV.new_empty((len(logits_TV), 0), dtype=torch.long) if ids_TJ is None else ids_TJ
    _check(logits_TV, ids_TJ, group)
    size = _size(group) * logits_TV.shape[1] if valid_vocab_size is None else valid_vocab_size
    if not 0 <= k <= size:
        raise ValueError(f"k={k} must lie between 0 and the vocabulary size {size}")
    ids_TK = _best_ids(_scaled(logits_TV, group, temperature, valid_vocab_size), k, group)
    both, entropy_T = logprobs(
        logits_TV,
        torch.cat([ids_TK, ids_TJ], dim=1),
        group,
        temperature=temperature,
        valid_vocab_size=valid_vocab_size,
        with_entropy=True,
    )
    return TeacherTopK(ids_TK, both[:, :k], entropy_T, both[:, k:])


# ------------------------------------------------------------------------------------------------------- internals
def _size(group: Group) -> int:
    return 1 if group is None else group.size()


def _first_id(logits_TV: Tensor, group: Group) -> int:
    return 0 if group is None else group.rank() * logits_TV.shape[1]


def _check(logits_TV: Tensor, ids_TK: Tensor, group: Group) -> None:
    if logits_TV.dim() != 2 or not logits_TV.is_floating_point():
        raise ValueError(f"logits_TV must be floating point [T, V/tp], got {logits_TV.dtype} {tuple(logits_TV.shape)}")
    if ids_TK.dim() != 2 or len(ids_TK) != len(logits_TV):
        raise ValueError(f"ids_TK must be [T, K] with T={len(logits_TV)} as in logits_TV, got {tuple(ids_TK.shape)}")
    vocab = _size(group) * logits_TV.shape[1]
    if ids_TK.numel() and int(ids_TK.max()) >= vocab:
        raise ValueError(f"ids_TK holds id {int(ids_TK.max())}, the global vocabulary has {vocab} ids")


def _scaled(logits_TV: Tensor, group: Group, temperature: float, valid_vocab_size: int | None) -> Tensor:
    """float32 logits over the temperature, ids at or above `valid_vocab_size` at -inf; a new tensor."""
    z_TV = logits_TV.float() / temperature  # a new tensor, at temperature 1 too
    if valid_vocab_size is not None:
        keep = max(0, valid_vocab_size - _first_id(logits_TV, group))
        if keep < z_TV.shape[1]:
            z_TV[:, keep:] = -torch.inf
    return z_TV


def _reduce(x: Tensor, op: dist.ReduceOp.RedOpType, group: Group) -> Tensor:
    if group is not None and group.size() > 1:
        dist.all_reduce(x, op, group=group)
    return x


def _local(ids_TK: Tensor, first: int, width: int) -> tuple[Tensor, Tensor]:
    """Ids as columns of this shard (clamped), and which of them lie on it."""
    local_TK = ids_TK - first
    here_TK = (local_TK >= 0) & (local_TK < width) & (ids_TK >= 0)
    return local_TK.clamp(0, width - 1), here_TK


def _best_ids(z_TV: Tensor, k: int, group: Group) -> Tensor:
    """Global ids of the k largest of z over the group; ties to the lowest id."""
    first = _first_id(z_TV, group)
    # A stable descending sort keeps the order of ids among equal logits, which torch.topk does not promise.
    if k == 1:
        values_TK, local_TK = z_TV.max(dim=1, keepdim=True)
        local_TK = (z_TV == values_TK).int().argmax(dim=1, keepdim=True)
    else:
        values_TK, local_TK = (x[:, :k] for x in z_TV.sort(dim=1, descending=True, stable=True))
    ids_TK = local_TK + first
    if group is None or group.size() == 1 or k == 0:
        return ids_TK
    missing = k - ids_TK.shape[1]  # a shard narrower than k
    if missing > 0:
        values_TK = torch.nn.functional.pad(values_TK, (0, missing), value=-torch.inf)
        ids_TK = torch.nn.functional.pad(ids_TK, (0, missing), value=0)
    # Ranks side by side are in order of their ids: a stable sort breaks ties as on one rank.
    all_values, all_ids = _side_by_side(values_TK, group), _side_by_side(ids_TK, group)
    order_TK = all_values.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return all_ids.gather(1, order_TK)


def _side_by_side(x_TK: Tensor, group: dist.ProcessGroup) -> Tensor:
    parts = [torch.empty_like(x_TK) for _ in range(group.size())]
    dist.all_gather(parts, x_TK.contiguous(), group=group)
    return torch.cat(parts, dim=1)


class _Logprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_TV, ids_TK, group, temperature, valid_vocab_size, with_entropy):
        z_TV = _scaled(logits_TV, group, temperature, valid_vocab_size)
        max_T = _reduce(z_TV.max(dim=1).values, dist.ReduceOp.MAX, group)
        z_TV.sub_(max_T[:, None])  # relative to the maximum, where float32 is finest for what is likely
        local_TK, here_TK = _local(ids_TK, _first_id(logits_TV, group), z_TV.shape[1])
        exp_TV = z_TV.exp()
        parts = [exp_TV.sum(dim=1, keepdim=True), z_TV.gather(1, local_TK).masked_fill_(~here_TK, 0.0)]
        if with_entropy:
            # sum of p z; a token of probability 0 contributes nothing, even where its logit is -inf
            parts.append((exp_TV * z_TV.masked_fill_(exp_TV == 0, 0.0)).sum(dim=1, keepdim=True))
        packed = _reduce(torch.cat(parts, dim=1), dist.ReduceOp.SUM, group)
        log_sum_T = packed[:, 0].log()
        out_TK = (packed[:, 1 : 1 + ids_TK.shape[1]] - log_sum_T[:, None]).masked_fill_(ids_TK < 0, 0.0)
        entropy_T = log_sum_T - packed[:, -1] / packed[:, 0] if with_entropy else log_sum_T.new_zeros(0)
        lse_T = max_T + log_sum_T
        ctx.save_for_backward(logits_TV, ids_TK, lse_T, entropy_T)
        ctx.set_materialize_grads(False)  # an entropy that is only logged costs nothing in the backward pass
        ctx.group, ctx.temperature, ctx.valid_vocab_size = group, temperature, valid_vocab_size
        return out_TK, entropy_T

    @staticmethod
    def backward(ctx, grad_TK, grad_entropy_T):
        logits_TV, ids_TK, lse_T, entropy_T = ctx.saved_tensors
        z_TV = _scaled(logits_TV, ctx.group, ctx.temperature, ctx.valid_vocab_size)
        log_p_TV = z_TV.sub_(lse_T[:, None])
        p_TV = log_p_TV.exp()
        grad_TK = torch.zeros_like(ids_TK, dtype=torch.float32) if grad_TK is None else grad_TK
        grad_TK = grad_TK.masked_fill(ids_TK < 0, 0.0)
        grad_TV = p_TV * -grad_TK.sum(dim=1, keepdim=True)
        if grad_entropy_T is not None and len(entropy_T):
            surprise_TV = log_p_TV.masked_fill(p_TV == 0, 0.0).add_(entropy_T[:, None])
            grad_TV -= grad_entropy_T[:, None] * p_TV * surprise_TV
        local_TK, here_TK = _local(ids_TK, _first_id(logits_TV, ctx.group), grad_TV.shape[1])
        grad_TV.scatter_add_(1, local_TK, grad_TK * here_TK)
        return (grad_TV / ctx.temperature).to(logits_TV.dtype), None, None, None, None, None
