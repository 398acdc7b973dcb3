"""The passes of `blocks` as Triton kernels, which read the logits once forward and once backward.

One program per token walks along its row. Statistics are in float32. Ids are handled apart from the
walk: their logits are loaded from the row, and after the backward walk their whole gradient is
stored over the walk's, so that ids which occur twice need no atomic addition in the logits' dtype.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_opd.vocab_parallel.shards import Shard, Statistics

# The fastest of 2048, 4096, 8192 columns and 2, 4, 8 warps on an H200 (docs/hardware.md). The first
# pass ends every block with a reduction over its threads.
BLOCK = 8192
_STATISTICS_WARPS = 4
_GRADIENT_WARPS = 8
SPAN = 32  # columns that their maximum stands for in the search for the best


@triton.jit
def _scaled(logits, temperature, SCALED: tl.constexpr):
    """The logits over the temperature in float32, rounded as torch does; `/` is not on CUDA."""
    z = logits.to(tl.float32)
    if SCALED:
        z = tl.div_rn(z, tl.zeros_like(z) + temperature)
    return z


@triton.jit
def _statistics_kernel(
    logits, columns, here, max_out, sum_out, dot_out, at_out, width, valid, temperature, k,
    K_PADDED: tl.constexpr, BLOCK: tl.constexpr, WITH_ENTROPY: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    row = logits + t * width
    minus_infinity = float("-inf")
    m = minus_infinity
    s = 0.0
    d = 0.0
    for start in range(0, valid, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        z = _scaled(
            tl.load(row + offsets, mask=offsets < valid, other=minus_infinity), temperature, SCALED
        )
        new_m = tl.maximum(m, tl.max(z, axis=0))
        base = tl.where(new_m == minus_infinity, 0.0, new_m)
        shift = tl.where(m == minus_infinity, 0.0, m - base)
        x = z - base
        e = tl.exp(x)
        scale = tl.exp(shift)
        if WITH_ENTROPY:
            # a token of probability 0 contributes nothing, even where its logit is -inf
            d = scale * (d + s * shift) + tl.sum(e * tl.where(e == 0.0, 0.0, x), axis=0)
        s = s * scale + tl.sum(e, axis=0)
        m = new_m
    tl.store(max_out + t, m)
    tl.store(sum_out + t, s)
    tl.store(dot_out + t, d)
    j = tl.arange(0, K_PADDED)
    own = tl.load(here + t * k + j, mask=j < k, other=0) != 0
    column = tl.load(columns + t * k + j, mask=j < k, other=0)
    at = _scaled(tl.load(row + column, mask=own, other=0.0), temperature, SCALED)
    tl.store(at_out + t * k + j, at, mask=j < k)


@triton.jit
def _gradient_kernel(
    logits, out, columns, here, lse, grads, entropy, entropy_grads, width, valid, temperature, k,
    K_PADDED: tl.constexpr, BLOCK: tl.constexpr, WITH_ENTROPY: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    row = logits + t * width
    out_row = out + t * width
    log_sum = tl.load(lse + t)
    h = 0.0
    grad_h = 0.0
    if WITH_ENTROPY:
        h = tl.load(entropy + t)
        grad_h = tl.load(entropy_grads + t)
    j = tl.arange(0, K_PADDED)
    grad = tl.load(grads + t * k + j, mask=j < k, other=0.0)
    total = tl.sum(grad, axis=0)
    own = tl.load(here + t * k + j, mask=j < k, other=0) != 0
    column = tl.load(columns + t * k + j, mask=j < k, other=0)
    log_p_at = _scaled(tl.load(row + column, mask=own, other=0.0), temperature, SCALED) - log_sum
    # In place, the walk overwrites these logits: every thread must have read them before.
    tl.debug_barrier()
    same = (column[:, None] == column[None, :]) & own[None, :]
    grad_of_id = tl.sum(tl.where(same, grad[None, :], 0.0), axis=1)
    p_at = tl.exp(log_p_at)
    weight_at = total + grad_h * (tl.where(p_at == 0.0, 0.0, log_p_at) + h)
    grad_at = (grad_of_id - p_at * weight_at) / temperature
    for start in range(0, width, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        token = offsets < valid
        z = _scaled(tl.load(row + offsets, mask=token, other=float("-inf")), temperature, SCALED)
        log_p = z - log_sum
        p = tl.exp(log_p)
        weight = total
        if WITH_ENTROPY:
            weight += grad_h * (tl.where(p == 0.0, 0.0, log_p) + h)
        gradient = tl.where(token, -p * weight / temperature, 0.0)
        tl.store(out_row + offsets, gradient.to(out.dtype.element_ty), mask=offsets < width)
    tl.debug_barrier()  # the stores below go over those of other threads
    tl.store(out_row + column, grad_at.to(out.dtype.element_ty), mask=own)


@triton.jit
def _maxima_kernel(logits, out, width, valid, spans, BLOCK: tl.constexpr, SPAN: tl.constexpr):
    """The largest logit of every SPAN columns of a row."""
    t = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + t * width + offsets, mask=offsets < valid, other=float("-inf"))
    span = tl.program_id(1) * (BLOCK // SPAN) + tl.arange(0, BLOCK // SPAN)
    largest = tl.max(tl.reshape(x.to(tl.float32), (BLOCK // SPAN, SPAN)), axis=1)
    tl.store(out + t * spans + span, largest.to(out.dtype.element_ty), mask=span < spans)


def statistics(
    logits_TV: Tensor,
    columns_TK: Tensor,
    here_TK: Tensor,
    shard: Shard,
    temperature: float,
    *,
    with_entropy: bool,
) -> Statistics:
    """The result of `blocks.statistics` for float32, bfloat16 or float16 logits."""
    result = Statistics.empty(len(logits_TV), columns_TK.shape[1], logits_TV)
    if len(logits_TV):
        _statistics_kernel[(len(logits_TV),)](
            logits_TV,
            columns_TK.contiguous(),
            _bytes(here_TK),
            result.max_T,
            result.sum_T,
            result.dot_T,
            result.at_TK,
            shard.width,
            shard.valid,
            float(temperature),
            columns_TK.shape[1],
            K_PADDED=_padded(columns_TK),
            BLOCK=BLOCK,
            WITH_ENTROPY=with_entropy,
            SCALED=temperature != 1.0,
            num_warps=_STATISTICS_WARPS,
        )
    return result


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
    """Writes the gradient that `blocks.gradient` does."""
    entropy_T, entropy_grad_T = entropy or (lse_T, lse_T)  # the kernel reads neither without one
    if len(logits_TV):
        _gradient_kernel[(len(logits_TV),)](
            logits_TV,
            out_TV,
            columns_TK.contiguous(),
            _bytes(here_TK),
            lse_T,
            grad_TK.contiguous(),
            entropy_T.contiguous(),
            entropy_grad_T.contiguous(),
            shard.width,
            shard.valid,
            float(temperature),
            columns_TK.shape[1],
            K_PADDED=_padded(columns_TK),
            BLOCK=BLOCK,
            WITH_ENTROPY=entropy is not None,
            SCALED=temperature != 1.0,
            num_warps=_GRADIENT_WARPS,
        )


def best(logits_TV: Tensor, k: int, shard: Shard, temperature: float) -> tuple[Tensor, Tensor]:
    """The result of `blocks.best`, by a few large operations and no wait for the device.

    The k best columns lie in the k spans with the largest maxima (the first of equal ones), because
    every span ranked higher has a column that is ranked higher. So all columns are read once, for
    the maxima.
    """
    k = min(k, shard.valid)
    if k == 0 or len(logits_TV) == 0:
        values_TK = Statistics.empty(len(logits_TV), k, logits_TV).at_TK
        return values_TK, values_TK.long()
    max_TC = logits_TV.new_empty(len(logits_TV), triton.cdiv(shard.valid, SPAN))
    grid = (len(logits_TV), triton.cdiv(shard.valid, BLOCK))
    _maxima_kernel[grid](
        logits_TV, max_TC, shard.width, shard.valid, max_TC.shape[1],
        BLOCK=BLOCK, SPAN=SPAN, num_warps=_STATISTICS_WARPS,
    )  # fmt: skip
    spans_TC = _largest(max_TC, min(k, max_TC.shape[1])).sort(dim=1).values
    inside_B = torch.arange(SPAN, device=logits_TV.device)
    columns_TX = (spans_TC[:, :, None] * SPAN + inside_B).flatten(1)
    candidates_TX = logits_TV.gather(1, columns_TX.clamp(max=shard.valid - 1))
    candidates_TX.masked_fill_(columns_TX >= shard.valid, -torch.inf)
    places_TK = _largest(candidates_TX, k)
    values_TK = candidates_TX.gather(1, places_TK).float() / temperature
    return values_TK, columns_TX.gather(1, places_TK) + shard.first_id


def _largest(values_TX: Tensor, k: int) -> Tensor:
    """The places of the k largest numbers of each row, the largest first.

    Equal numbers come in order of their place. The number's bits, ordered as an integer, and the
    place make one integer, so that no two are equal.
    """
    half = values_TX.element_size() == 2 and values_TX.shape[1] <= 2**16
    bits = 16 if half else 32
    narrow = torch.int16 if half else torch.int32
    wide = torch.int32 if half else torch.int64
    # Adding 0 makes +0 of -0, whose bits would come after it.
    values_TX = values_TX + 0.0 if half else values_TX.float() + 0.0
    number_TX = values_TX.view(narrow)
    number_TX = number_TX ^ ((number_TX >> (bits - 1)) & (2 ** (bits - 1) - 1))
    place_X = torch.arange(values_TX.shape[1], dtype=wide, device=values_TX.device)
    last = 2**bits - 1
    keys_TX = (number_TX.to(wide) << bits) | (last - place_X)
    return (last - (keys_TX.topk(k, dim=1).values & last)).long()


def _bytes(mask: Tensor) -> Tensor:
    return mask.contiguous().view(torch.uint8)


def _padded(columns_TK: Tensor) -> int:
    return triton.next_power_of_2(max(1, columns_TK.shape[1]))
