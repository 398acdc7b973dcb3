"""Per-token columns of an update: advantages, gates and the global denominators of every term, in
float64.

Every rank sees all rows of the update, so nothing here depends on the layout or on
micro-batches.
"""

from collections.abc import Mapping
from typing import assert_never

import numpy as np
import torch
from torch import Tensor

from megatron_opd.mcore.batch import Columns, flatten
from megatron_opd.methods.method import MethodConfig
from megatron_opd.methods.needs import active
from megatron_opd.methods.part import Aggregate, Denominator, GatePart, TermPart, When
from megatron_opd.methods.tokens import Tokens
from megatron_opd.objective.arithmetic import whitened
from megatron_opd.objective.batch import Batch


def build_columns(method: MethodConfig, batch: Batch) -> Columns:
    """The columns that the terms of `method` read, for all completion tokens of the batch's
    rows.

    The scales of a term depend on its own tokens and gates alone, or with `denominator: all` on all
    tokens: what other terms count does not dilute it. Terms without a weight at the batch's step
    have columns of zeros: nobody was asked for the signals that they read.
    """
    now = active(method, batch.step).terms
    scales_J: list[Tensor] = []
    gates_J: list[Tensor] = []
    advantages_J: list[Tensor] = []
    for name in method.terms:
        term = now.get(name)
        columns = [batch.zeros_T] * 3 if term is None else _columns_of(term, method, batch)
        for collected, column_T in zip((scales_J, gates_J, advantages_J), columns, strict=True):
            collected.append(column_T)
    signals = batch.signals
    teacher = signals.teacher
    student = signals.student
    return Columns(
        ids_T=flatten([r.token_ids for r in batch.rows], torch.long),
        scales_TJ=torch.stack(scales_J, dim=1).float(),
        sequence_T=batch.sequence_T,
        sources_T=batch.sources_T,
        drawn_T=batch.drawn_T,
        gates_TJ=torch.stack(gates_J, dim=1).float(),
        advantages_TJ=torch.stack(advantages_J, dim=1).float(),
        rollout_logprobs_T=batch.rollout_T.float() if batch.drawn_T.any() else None,
        old_logprobs_T=_column(student.logprobs_T if student else None),
        teacher_argmax_T=_column(teacher.argmax_ids_T if teacher else None),
        teacher_logprobs_T=_column(teacher.logprobs_T if teacher else None),
        topk_ids_TK=_column(teacher.topk_ids_TK if teacher else None),
        topk_logprobs_TK=_column(teacher.topk_logprobs_TK if teacher else None),
        reference_logprobs_T=_column(signals.reference_logprobs_T),
    )


def _columns_of(term: TermPart, method: MethodConfig, batch: Batch) -> list[Tensor]:
    """A term's scales, gates and fixed advantages, each float64 [T]."""
    counted_T = (batch.trace_T if term.of_traces else batch.sampled_T).double()
    gate_T = counted_T * gates_at(term.gates, batch, "before")
    base_T = _averaged_over(term.denominator, counted_T, gate_T, batch.written_T)
    scale_T = gate_T * denominators(base_T, batch, term.aggregate)
    if method.teacher_share and not term.of_traces:
        scale_T = scale_T * mixture_weights(method.teacher_share, batch)
    if term.correction:
        scale_T = scale_T * term.correction.value(batch)
    fixed_T = term.fixed(batch)
    if term.whiten:
        fixed_T = whitened(fixed_T, counted_T > 0)
    return [scale_T, gate_T, fixed_T]


def gates_at(gates: Mapping[str, GatePart], tokens: Tokens, when: When) -> Tensor:
    """The product of the gates of one moment, [T]: float64 before the update, float32 within
    it."""
    product_T = tokens.zeros_T + 1
    for gate in gates.values():
        if gate.when() == when:
            value_T = gate.value(tokens).to(product_T.dtype)
            product_T = product_T * (1 - value_T if gate.invert else value_T)
    return product_T.detach()


def _averaged_over(
    denominator: Denominator, counted_T: Tensor, gate_T: Tensor, written_T: Tensor
) -> Tensor:
    """The weight of each token in a term's denominator, float64 [T]."""
    match denominator:
        case "tokens":
            return counted_T
        case "gated":
            return gate_T
        case "all":
            return written_T.double()
        case _:
            assert_never(denominator)


def mixture_weights(share: float, batch: Batch) -> Tensor:
    """p_student / ((1 - share) p_student + share p_teacher) of each token, float64 [T], at the
    step's first weights.

    What is drawn from the mixture then has the student's expectation. MiniLLM, arXiv 2306.08543,
    section 2.2, which weights a token for its own draw and not for those before it.
    """
    return 1.0 / (1.0 - share + share * batch.log_ratio("teacher", "old").exp())


def denominators(counted_T: Tensor, batch: Batch, aggregate: Aggregate) -> Tensor:
    """The factors of the tokens' losses that make the aggregate, float64 [T].

    counted_T: float64, how much each token counts (0 or 1, or a gate). With n the tokens that
    count, N the sequences that have some, n_i those of the token's sequence: token-mean 1/n;
    seq-mean-token-mean 1/(N n_i); seq-mean-token-sum 1/N; seq-mean-token-sum-norm 1/(N
    max_completion_tokens); token-sum 1.
    """
    ones_T = torch.ones_like(counted_T)
    if aggregate == "token-sum":
        return ones_T
    if aggregate == "token-mean":
        return ones_T / counted_T.sum().clamp(min=torch.finfo(torch.float64).tiny)
    counts_N = counted_T.new_zeros(len(batch.rows)).index_add(0, batch.sequence_T, counted_T)
    sequences = max(int((counts_N > 0).sum()), 1)
    match aggregate:
        case "seq-mean-token-mean":
            count_T = counts_N[batch.sequence_T]
            return (1.0 / (sequences * count_T)).masked_fill(count_T == 0, 0.0)
        case "seq-mean-token-sum":
            return ones_T / sequences
        case "seq-mean-token-sum-norm":
            return ones_T / (sequences * batch.max_completion_tokens)
        case _:
            assert_never(aggregate)


def _column(values: np.ndarray | None) -> Tensor | None:
    if values is None:
        return None
    tensor = torch.from_numpy(values)
    return tensor.long() if np.issubdtype(values.dtype, np.integer) else tensor.float()
