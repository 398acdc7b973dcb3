"""Logprobs, entropy and top-k of logits whose vocabulary is split over tensor-parallel ranks.

Rank r of a group of `tp` has columns [r * V/tp, (r+1) * V/tp) of the logits; ids are global.
`shards` derives how two reductions combine the shards, docs/vocab_parallel.md the gradient and the
bytes. The passes over the logits are in `blocks` (torch, any device) and `kernels` (Triton, CUDA);
`passes` chooses.
"""

from types import ModuleType
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opd.vocab_parallel import blocks
from megatron_opd.vocab_parallel.checks import check_ids, check_k, check_logits
from megatron_opd.vocab_parallel.shards import (
    Distribution,
    Group,
    Shard,
    Statistics,
    combine,
    distribution,
    rebased,
    size,
)


class TeacherTopK(NamedTuple):
    """A frozen model's numbers of the next token; none has a gradient."""

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
    reuse_logits_for_grad: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probabilities of K ids per token, and the entropy if asked.

    Gradients flow to `logits_TV` through both.

    Args:
        logits_TV: float32, bfloat16, float16 or float64 [T, V/tp], contiguous: this rank's shard.
            Statistics are in float32 (float64 for float64).
        ids_TK: int64 [T, K], global ids; an id below 0 means "no target": logprob 0 and no
            gradient.
        group: the tensor-parallel group, or None for one rank. All ranks give equal arguments, but
            for the shard.
        temperature: the logits are divided by it first.
        valid_vocab_size: ids from this number on (padding, or unknown to the other model) have
            probability 0.
        with_entropy: return (logprobs_TK, entropy_T).
        reuse_logits_for_grad: the backward pass writes the gradient into the storage of
            `logits_TV`. Only for logits that nothing reads after the backward pass, and one
            backward pass.

    Returns:
        logprobs_TK float32 [T, K]; with `with_entropy` also entropy_T float32 [T], in nats. Both
        are equal on every rank.

    Communication: at most 2 collectives forward, 0 backward. Raises ValueError for shapes or dtypes
    that do not fit, and for an id at or above the global vocabulary size.
    """
    check_logits(logits_TV)
    check_ids(ids_TK, len(logits_TV), size(group) * logits_TV.shape[1])
    shard = Shard.of(logits_TV.shape[1], group, valid_vocab_size)
    settings = (group, shard, temperature, valid_vocab_size, with_entropy, reuse_logits_for_grad)
    out_TK, entropy_T = _Logprobs.apply(logits_TV, ids_TK, *settings)
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
    """The k most likely ids, the entropy, and the logprobs of the ids `ids_TJ`. No gradient.

    Arguments are as for `logprobs`; `k` may be 0. Of equal logits the lowest id wins, so that the
    result does not depend on the layout. One collective. Raises ValueError as `logprobs`, and when
    k exceeds the vocabulary.
    """
    check_logits(logits_TV)
    ids_TJ = no_ids(logits_TV) if ids_TJ is None else ids_TJ
    check_ids(ids_TJ, len(logits_TV), size(group) * logits_TV.shape[1], "ids_TJ")
    check_k(k, logits_TV.shape[1], group, valid_vocab_size)
    shard = Shard.of(logits_TV.shape[1], group, valid_vocab_size)
    columns_TJ, here_TJ = shard.columns(ids_TJ)
    local = passes(logits_TV).statistics(
        logits_TV, columns_TJ, here_TJ, shard, temperature, with_entropy=True
    )
    best = passes(logits_TV).best(logits_TV, k, shard, temperature)
    return merge_topk(local, best, ids_TJ, k, group, valid_vocab_size)


def no_ids(like: Tensor) -> Tensor:
    """Ids [T, 0], on the device and for the tokens of `like`."""
    return torch.empty((len(like), 0), dtype=torch.long, device=like.device)


def passes(logits_TV: Tensor) -> ModuleType:
    """The module whose `statistics`, `gradient` and `best` run on these logits."""
    if not logits_TV.is_cuda or logits_TV.dtype == torch.float64:
        return blocks
    from megatron_opd.vocab_parallel import kernels

    return kernels


def merge_topk(
    local: Statistics,
    best: tuple[Tensor, Tensor],
    ids_TJ: Tensor,
    k: int,
    group: Group,
    valid_vocab_size: int | None,
) -> TeacherTopK:
    """The whole vocabulary's result from the shards' statistics, values and ids of their best.

    One gather of a few numbers per token.
    """
    values_TK, ids_TK = best
    if size(group) == 1:
        return _signals(combine(local, ids_TJ, None, valid_vocab_size), values_TK, ids_TK)
    missing = k - values_TK.shape[1]  # a shard with fewer tokens than k
    values_TK = torch.nn.functional.pad(values_TK, (0, missing), value=-torch.inf)
    # The ids of the values added sort after every real one.
    ids_TK = torch.nn.functional.pad(ids_TK, (0, missing), value=torch.iinfo(torch.int32).max)
    sums_T3 = torch.stack([local.max_T, local.sum_T, local.dot_T], dim=1)
    # float64 carries ids and float32 exactly.
    packed = torch.cat([x.double() for x in (sums_T3, local.at_TK, values_TK, ids_TK)], dim=1)
    gathered = [torch.empty_like(packed) for _ in range(size(group))]
    dist.all_gather(gathered, packed, group=group)
    widths = [3, ids_TJ.shape[1], k, k]
    sums_RT3, at_RTJ, values_RTK, ids_RTK = torch.stack(gathered).split(widths, dim=-1)
    max_RT, sum_RT, dot_RT = sums_RT3.unbind(-1)
    shards = Statistics(max_RT, sum_RT, dot_RT, at_RTJ)
    max_T = shards.max_T.amax(dim=0)
    whole = distribution(max_T, rebased(shards, max_T).sum(dim=0), ids_TJ, valid_vocab_size)
    values_TX = values_RTK.transpose(0, 1).flatten(1)
    ids_TX = ids_RTK.long().transpose(0, 1).flatten(1)
    values_TX, ids_TX = blocks.by_value_then_id(values_TX, ids_TX)
    return _signals(whole, values_TX[:, :k], ids_TX[:, :k])


def _signals(whole: Distribution, values_TK: Tensor, ids_TK: Tensor) -> TeacherTopK:
    logprobs_TK = values_TK - whole.lse_T[:, None]
    return TeacherTopK(
        ids_TK, logprobs_TK.float(), whole.entropy_T.float(), whole.logprobs_TK.float()
    )


def grad_of_targets(grad_TK: Tensor | None, ids_TK: Tensor, lse_T: Tensor) -> Tensor:
    """The incoming gradient of the logprobs (None is zeros), with zeros for ids below 0."""
    grad_TK = torch.zeros_like(ids_TK, dtype=lse_T.dtype) if grad_TK is None else grad_TK
    return grad_TK.masked_fill(ids_TK < 0, 0.0)


class _Logprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, logits_TV, ids_TK, group, shard, temperature, valid_vocab_size, with_entropy, reuse
    ):
        columns_TK, here_TK = shard.columns(ids_TK)
        local = passes(logits_TV).statistics(
            logits_TV, columns_TK, here_TK, shard, temperature, with_entropy=with_entropy
        )
        whole = combine(local, ids_TK, group, valid_vocab_size)
        entropy_T = whole.entropy_T if with_entropy else whole.entropy_T.new_zeros(0)
        ctx.save_for_backward(logits_TV, columns_TK, here_TK, ids_TK, whole.lse_T, entropy_T)
        # An entropy that is only logged costs nothing in the backward pass.
        ctx.set_materialize_grads(False)
        ctx.shard = shard
        ctx.temperature = temperature
        ctx.reuse = reuse
        return whole.logprobs_TK, entropy_T

    @staticmethod
    def backward(ctx, grad_TK, grad_entropy_T):
        logits_TV, columns_TK, here_TK, ids_TK, lse_T, entropy_T = ctx.saved_tensors
        grad_TK = grad_of_targets(grad_TK, ids_TK, lse_T)
        use_entropy = grad_entropy_T is not None and len(entropy_T) > 0
        entropy = (entropy_T, grad_entropy_T) if use_entropy else None
        # Detached, because autograd should not see that the gradient is written.
        out_TV = logits_TV.detach() if ctx.reuse else torch.empty_like(logits_TV)
        passes(logits_TV).gradient(
            logits_TV,
            out_TV,
            columns_TK,
            here_TK,
            ctx.shard,
            ctx.temperature,
            lse_T,
            grad_TK,
            entropy,
        )
        return out_TV, None, None, None, None, None, None, None
