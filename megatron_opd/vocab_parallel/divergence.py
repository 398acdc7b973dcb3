"""Divergences between a student and a frozen teacher over the whole sharded vocabulary.

A divergence is a sum over ids of h(log p, log q), where p is the student's and q the teacher's
probability. A kind is a function that returns h and its derivative h' by log p, from which the
gradient by the student's logits follows: d/dz_v = h'_v - p_v sum_u h'_u.
"""

from collections.abc import Callable
from functools import partial
from math import log

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opd.vocab_parallel.blocks import FINITE, blocks_of
from megatron_opd.vocab_parallel.checks import check_logits
from megatron_opd.vocab_parallel.ops import no_ids, passes
from megatron_opd.vocab_parallel.shards import Group, Shard, Statistics, combine, size

# Takes log p and log q of some ids; returns h and dh / d log p.
Pointwise = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def divergence(
    student_logits_TV: Tensor,
    teacher_logits_TV: Tensor,
    group: Group,
    *,
    kind: str,
    alpha: float | None = None,
    beta: float | None = None,
    temperature: float = 1.0,
    valid_vocab_size: int | None = None,
) -> Tensor:
    """The divergence of the student from the teacher at each token, float32 [T], in nats.

    It is equal on every rank. Gradients flow to the student's logits alone.

    Args:
        student_logits_TV, teacher_logits_TV: [T, V/tp], contiguous, shards of the same ids; dtypes
            may differ.
        kind: one of
            forward_kl       KL(q || p)
            reverse_kl       KL(p || q)
            jsd              beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p
                             (GKD, 2306.13649)
            skew_forward_kl  KL(q || alpha q + (1 - alpha) p)
            skew_reverse_kl  KL(p || alpha p + (1 - alpha) q)  (both DistiLLM, 2402.03898)
            tvd              half the sum of |p - q|
            alpha_beta       -1/(ab) sum [q^a p^b - a/(a+b) q^(a+b) - b/(a+b) p^(a+b)]
                             (ABKD, 2505.04560)
        alpha, beta: parameters of the kinds that have them, within (0, 1); for alpha_beta, a, b and
            a + b must not be 0.
        temperature: divides both models' logits; the loss is not multiplied with its square.
        valid_vocab_size: ids from this number on have probability 0 on both sides.

    Communication: 3 collectives forward, 0 backward. Raises ValueError for shapes that differ, an
    unknown kind, and a parameter that is missing, superfluous or out of range.
    """
    check_logits(student_logits_TV, "student_logits_TV")
    check_logits(teacher_logits_TV, "teacher_logits_TV")
    if student_logits_TV.shape != teacher_logits_TV.shape:
        shapes = f"{tuple(student_logits_TV.shape)} and {tuple(teacher_logits_TV.shape)}"
        raise ValueError(
            f"student_logits_TV and teacher_logits_TV must have one shape, got {shapes}"
        )
    shard = Shard.of(student_logits_TV.shape[1], group, valid_vocab_size)
    pointwise = _kind(kind, alpha, beta)
    return _Divergence.apply(
        student_logits_TV, teacher_logits_TV.detach(), group, shard, pointwise, temperature
    )


# ---------------------------------------------------------------------------------------- the kinds
def _forward_kl(lp: Tensor, lq: Tensor) -> tuple[Tensor, Tensor]:
    q = lq.exp()
    return q * (lq - lp), -q


def _reverse_kl(lp: Tensor, lq: Tensor) -> tuple[Tensor, Tensor]:
    p = lp.exp()
    h = p * (lp - lq)
    return h, h + p


def _jsd(lp: Tensor, lq: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    lm = torch.logaddexp(lq + log(beta), lp + log1m(beta))
    student = (1 - beta) * lp.exp() * (lp - lm)
    return beta * lq.exp() * (lq - lm) + student, student


def _skew_forward_kl(lp: Tensor, lq: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    lm = torch.logaddexp(lq + log(alpha), lp + log1m(alpha))
    q = lq.exp()
    return q * (lq - lm), -q * (lp + log1m(alpha) - lm).exp()


def _skew_reverse_kl(lp: Tensor, lq: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    lm = torch.logaddexp(lp + log(alpha), lq + log1m(alpha))
    p = lp.exp()
    h = p * (lp - lm)
    return h, h + p - p * (lp + log(alpha) - lm).exp()


def _tvd(lp: Tensor, lq: Tensor) -> tuple[Tensor, Tensor]:
    p = lp.exp()
    q = lq.exp()
    return 0.5 * (p - q).abs(), 0.5 * (p - q).sign() * p


def _alpha_beta(lp: Tensor, lq: Tensor, alpha: float, beta: float) -> tuple[Tensor, Tensor]:
    s = alpha + beta
    mixed = (alpha * lq + beta * lp).exp()
    teacher = (s * lq).exp()
    student = (s * lp).exp()
    h = -(mixed - alpha / s * teacher - beta / s * student) / (alpha * beta)
    return h, -(mixed - student) / alpha


def log1m(x: float) -> float:
    """log(1 - x)."""
    return log(1.0 - x)


_KINDS: dict[str, tuple[Callable[..., tuple[Tensor, Tensor]], tuple[str, ...]]] = {
    "forward_kl": (_forward_kl, ()),
    "reverse_kl": (_reverse_kl, ()),
    "jsd": (_jsd, ("beta",)),
    "skew_forward_kl": (_skew_forward_kl, ("alpha",)),
    "skew_reverse_kl": (_skew_reverse_kl, ("alpha",)),
    "tvd": (_tvd, ()),
    "alpha_beta": (_alpha_beta, ("alpha", "beta")),
}


def _kind(kind: str, alpha: float | None, beta: float | None) -> Pointwise:
    if kind not in _KINDS:
        raise ValueError(f"kind={kind!r} is unknown; known: {', '.join(_KINDS)}")
    function, wanted = _KINDS[kind]
    parameters = {"alpha": alpha, "beta": beta}
    given = {name: value for name, value in parameters.items() if value is not None}
    if set(given) != set(wanted):
        raise ValueError(
            f"kind={kind!r} takes {' and '.join(wanted) or 'no parameters'}, got {sorted(given)}"
        )
    if kind == "alpha_beta" and 0 in (alpha, beta, (alpha or 0) + (beta or 0)):
        raise ValueError(
            f"kind='alpha_beta' needs alpha, beta and their sum not 0, got alpha={alpha}, "
            f"beta={beta}"
        )
    for name, value in given.items():
        if kind != "alpha_beta" and not 0 < value < 1:
            raise ValueError(f"{name}={value} must lie between 0 and 1 for kind={kind!r}")
    return partial(function, **given)


# --------------------------------------------------------------------------------------- the passes
class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student_TV, teacher_TV, group, shard, pointwise, temperature):
        lse_T, teacher_lse_T = _both_lse(student_TV, teacher_TV, group, shard, temperature)
        sums_T2 = lse_T.new_zeros(len(lse_T), 2)  # of h and of its derivative
        pairs = _log_pairs(student_TV, teacher_TV, lse_T, teacher_lse_T, shard, temperature)
        for rows, lp, lq in pairs:
            h, derivative = pointwise(lp, lq)
            sums_T2[rows, 0] = h.sum(dim=1)
            sums_T2[rows, 1] = derivative.sum(dim=1)
        if size(group) > 1:
            dist.all_reduce(sums_T2, group=group)
        ctx.save_for_backward(student_TV, teacher_TV, lse_T, teacher_lse_T, sums_T2[:, 1].clone())
        ctx.shard = shard
        ctx.pointwise = pointwise
        ctx.temperature = temperature
        return sums_T2[:, 0].clone()

    @staticmethod
    def backward(ctx, grad_T):
        student_TV, teacher_TV, lse_T, teacher_lse_T, total_T = ctx.saved_tensors
        out_TV = torch.empty_like(student_TV)
        out_TV[:, ctx.shard.valid :] = 0
        pairs = _log_pairs(student_TV, teacher_TV, lse_T, teacher_lse_T, ctx.shard, ctx.temperature)
        for rows, lp, lq in pairs:
            _, derivative = ctx.pointwise(lp, lq)
            by_logits = derivative - lp.exp() * total_T[rows, None]
            weight = grad_T[rows, None] / ctx.temperature
            out_TV[rows, : ctx.shard.valid] = by_logits * weight
        return out_TV, None, None, None, None, None


def _both_lse(
    student_TV: Tensor, teacher_TV: Tensor, group: Group, shard: Shard, temperature: float
) -> tuple[Tensor, Tensor]:
    """The log of the sum of exponentials of student and teacher, from one pair of collectives."""
    ids_TK = no_ids(student_TV)
    columns_TK, here_TK = shard.columns(ids_TK)
    local = []
    for logits_TV in (student_TV, teacher_TV):
        local.append(
            passes(logits_TV).statistics(
                logits_TV, columns_TK, here_TK, shard, temperature, with_entropy=False
            )
        )
    none_TK = torch.cat([ids_TK, ids_TK])
    lse_T, teacher_lse_T = combine(Statistics.joined(local), none_TK, group, None).lse_T.chunk(2)
    return lse_T, teacher_lse_T


def _log_pairs(student_TV, teacher_TV, lse_T, teacher_lse_T, shard, temperature):
    """Yields the rows, log p and log q of every block.

    A probability of 0 has a finite logarithm, so that 0 times it is 0.
    """
    if shard.valid == 0:
        return
    student = blocks_of(student_TV, shard, temperature, lse_T.dtype)
    teacher = blocks_of(teacher_TV, shard, temperature, lse_T.dtype)
    for (rows, z), (_, teacher_z) in zip(student, teacher, strict=True):
        lp = z.sub_(lse_T[rows, None]).clamp_(min=FINITE)
        yield rows, lp, teacher_z.sub_(teacher_lse_T[rows, None]).clamp_(min=FINITE)
