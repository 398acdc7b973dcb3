"""The operation fused with the output layer: all logits never exist at once.

Logits exist for a slab of `slab_tokens` tokens at a time. The forward pass keeps a few numbers per
token; the backward pass makes each slab's logits again and turns them into their gradient in place.
"""

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opd.contracts.merged_ids import MergedIds
from megatron_opd.vocab_parallel.checks import check_hidden, check_ids, check_k
from megatron_opd.vocab_parallel.merged import merge_logits, rows_of
from megatron_opd.vocab_parallel.ops import TeacherTopK, grad_of_targets, merge_topk, no_ids, passes
from megatron_opd.vocab_parallel.shards import Group, Shard, Statistics, combine, size

# Without `slab_tokens`, a slab is an eighth of the tokens. It has at least SLAB_TOKENS, since fewer
# make slim products, and at most SLAB_LOGITS logits (256 MiB in bfloat16), since a larger one would
# need more than the weight's float32 gradient.
SLAB_TOKENS = 256
SLAB_LOGITS = 2**27


def linear_logprobs(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    ids_TK: Tensor,
    group: Group,
    *,
    temperature: float = 1.0,
    valid_vocab_size: int | None = None,
    with_entropy: bool = False,
    slab_tokens: int | None = None,
    reduce_hidden_grad: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """`logprobs` of the logits hidden @ weight.T; gradients flow to both.

    Args:
        hidden_TD: [T, D], equal on every rank, in the dtype of the weight, to which logits are
            rounded.
        weight_VD: [V/tp, D], this rank's rows. Its gradient is accumulated over the slabs in
            float32.
        slab_tokens: tokens whose logits exist at one time; the default is an eighth of them, at
            least 256, and at most 256 MiB of logits in bfloat16.
        reduce_hidden_grad: add up the hidden gradient over the group (one collective). Without it
            each rank returns its summand, for a caller whose own backward pass adds them up, as the
            gather of sequence parallelism does.
        Others: as for `logprobs`.

    Returns as `logprobs`. Communication: at most 2 collectives forward, for any number of slabs;
    backward only the hidden gradient's. Raises ValueError as `logprobs`, and for a slab_tokens
    below 1.
    """
    check_hidden(hidden_TD, weight_VD)
    check_ids(ids_TK, len(hidden_TD), size(group) * len(weight_VD))
    shard = Shard.of(len(weight_VD), group, valid_vocab_size)
    slab = _slab(slab_tokens, len(hidden_TD), len(weight_VD))
    settings = (group, shard, temperature, valid_vocab_size, with_entropy, slab, reduce_hidden_grad)
    out_TK, entropy_T = _LinearLogprobs.apply(hidden_TD, weight_VD, ids_TK, *settings)
    return (out_TK, entropy_T) if with_entropy else out_TK


@torch.no_grad()
def linear_topk(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    k: int,
    group: Group,
    *,
    ids_TJ: Tensor | None = None,
    temperature: float = 1.0,
    valid_vocab_size: int | None = None,
    slab_tokens: int | None = None,
    merged: MergedIds | None = None,
) -> TeacherTopK:
    """`topk` of the logits hidden @ weight.T, in which `merged` ids are one.

    Other arguments are as for `linear_logprobs` and `topk`. One collective, and one more if ids are
    merged.
    """
    check_hidden(hidden_TD, weight_VD)
    ids_TJ = no_ids(hidden_TD) if ids_TJ is None else ids_TJ
    check_ids(ids_TJ, len(hidden_TD), size(group) * len(weight_VD), "ids_TJ")
    check_k(k, len(weight_VD), group, valid_vocab_size)
    shard = Shard.of(len(weight_VD), group, valid_vocab_size)
    columns_TJ, here_TJ = shard.columns(ids_TJ)
    statistics = []
    best_values = []
    best_ids = []
    slab = _slab(slab_tokens, len(hidden_TD), len(weight_VD))
    rows_ED = rows_of(weight_VD, merged, group) if merged else None
    for rows in _slabs(len(hidden_TD), slab):
        logits_TV = hidden_TD[rows] @ weight_VD.T
        if merged and rows_ED is not None:
            merge_logits(
                logits_TV,
                hidden_TD[rows],
                rows_ED,
                merged,
                first_id=shard.first_id,
                temperature=temperature,
            )
        local = passes(logits_TV).statistics
        statistics.append(
            local(logits_TV, columns_TJ[rows], here_TJ[rows], shard, temperature, with_entropy=True)
        )
        values, ids = passes(logits_TV).best(logits_TV, k, shard, temperature)
        best_values.append(values)
        best_ids.append(ids)
    best = torch.cat(best_values), torch.cat(best_ids)
    return merge_topk(Statistics.joined(statistics), best, ids_TJ, k, group, valid_vocab_size)


# ---------------------------------------------------------------------------------------- internals
def default_slab(tokens: int, width: int) -> int:
    """The tokens of a slab if the caller names none: see SLAB_TOKENS."""
    tokens = min(max(-(-tokens // 8), SLAB_TOKENS), SLAB_LOGITS // width)
    # A multiple of SLAB_TOKENS makes whole tiles of a matrix product.
    return max(1, tokens // SLAB_TOKENS * SLAB_TOKENS or tokens)


def _slab(slab_tokens: int | None, tokens: int, width: int) -> int:
    if slab_tokens is None:
        return default_slab(tokens, width)
    if slab_tokens < 1:
        raise ValueError(f"slab_tokens={slab_tokens} must be at least 1")
    return slab_tokens


def _slabs(tokens: int, slab: int) -> list[slice]:
    """The rows of each slab; at least one slab, so that no tokens give results of right shape."""
    return [slice(start, min(start + slab, tokens)) for start in range(0, max(tokens, 1), slab)]


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden_TD,
        weight_VD,
        ids_TK,
        group,
        shard,
        temperature,
        valid,
        with_entropy,
        slab,
        reduce,
    ):
        columns_TK, here_TK = shard.columns(ids_TK)
        statistics = []
        for rows in _slabs(len(hidden_TD), slab):
            logits_TV = hidden_TD[rows] @ weight_VD.T
            local = partial(passes(logits_TV).statistics, with_entropy=with_entropy)
            statistics.append(local(logits_TV, columns_TK[rows], here_TK[rows], shard, temperature))
            del logits_TV  # before the next slab's
        whole = combine(Statistics.joined(statistics), ids_TK, group, valid)
        entropy_T = whole.entropy_T if with_entropy else whole.entropy_T.new_zeros(0)
        ctx.save_for_backward(
            hidden_TD, weight_VD, columns_TK, here_TK, ids_TK, whole.lse_T, entropy_T
        )
        ctx.set_materialize_grads(False)
        ctx.group = group
        ctx.shard = shard
        ctx.temperature = temperature
        ctx.slab = slab
        ctx.reduce = reduce
        return whole.logprobs_TK, entropy_T

    @staticmethod
    def backward(ctx, grad_TK, grad_entropy_T):
        hidden_TD, weight_VD, columns_TK, here_TK, ids_TK, lse_T, entropy_T = ctx.saved_tensors
        grad_TK = grad_of_targets(grad_TK, ids_TK, lse_T)
        use_entropy = grad_entropy_T is not None and len(entropy_T) > 0
        grad_hidden_TD = torch.empty_like(hidden_TD) if ctx.needs_input_grad[0] else None
        grad_weight_VD = None
        if ctx.needs_input_grad[1]:
            grad_weight_VD = torch.zeros_like(weight_VD, dtype=lse_T.dtype)
        for rows in _slabs(len(hidden_TD), ctx.slab):
            logits_TV = hidden_TD[rows] @ weight_VD.T
            entropy = (entropy_T[rows], grad_entropy_T[rows]) if use_entropy else None
            passes(logits_TV).gradient(
                logits_TV,
                logits_TV,
                columns_TK[rows],
                here_TK[rows],
                ctx.shard,
                ctx.temperature,
                lse_T[rows],
                grad_TK[rows],
                entropy,
            )
            if grad_hidden_TD is not None:
                torch.mm(logits_TV, weight_VD, out=grad_hidden_TD[rows])
            if grad_weight_VD is not None:
                _add_product(grad_weight_VD, logits_TV, hidden_TD[rows])
            del logits_TV
        if grad_hidden_TD is not None and ctx.reduce and size(ctx.group) > 1:
            dist.all_reduce(grad_hidden_TD, group=ctx.group)
        return grad_hidden_TD, grad_weight_VD, None, None, None, None, None, None, None, None


def _add_product(total_VD: Tensor, grad_TV: Tensor, hidden_TD: Tensor) -> None:
    """Adds grad.T @ hidden to `total`; products and sums are in the dtype of `total`."""
    if grad_TV.dtype == total_VD.dtype:
        total_VD.addmm_(grad_TV.T, hidden_TD)
    elif grad_TV.is_cuda:
        torch.addmm(total_VD, grad_TV.T, hidden_TD, out_dtype=total_VD.dtype, out=total_VD)
    else:
        total_VD.addmm_(grad_TV.T.to(total_VD.dtype), hidden_TD.to(total_VD.dtype))
