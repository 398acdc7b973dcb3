"""Per-token columns of an update: advantages, gates and the global denominators of every term, in
float64.

Every rank sees all rows of the update, so nothing here depends on the layout or on
micro-batches.
"""

from typing import assert_never

import numpy as np
import torch
from torch import Tensor

from megatron_opd.mcore.batch import Columns, flatten
from megatron_opd.methods.advantages import (
    LogRatioAdvantage,
    LogRatioFactor,
    ProcessRewardAdvantage,
    RewardAdvantage,
    ShapingAdvantage,
    TopKAdvantage,
)
from megatron_opd.methods.needs import (
    active,
    advantages_of,
    gates_of,
    of_sequence,
    reads_traces,
    weight_at,
)
from megatron_opd.methods.terms import (
    Aggregate,
    EntropyTerm,
    MethodConfig,
    PolicyGradientTerm,
    Term,
)
from megatron_opd.objective.advantages import (
    group_advantages,
    log_ratio,
    overlong_penalty,
    transformed,
    whitened,
)
from megatron_opd.objective.batch import Batch
from megatron_opd.objective.gates import correction, gates


def build_columns(method: MethodConfig, batch: Batch, *, max_completion_tokens: int) -> Columns:
    """The columns that the terms of `method` read, for all completion tokens of the batch's
    rows.

    The scales of a term depend on its own tokens and gates alone, or with `denominator: all` on all
    tokens: what other terms count does not dilute it. Terms without a weight at the batch's step
    have columns of zeros: nobody was asked for the signals that they read.
    """
    now, zeros_T = (
        active(method, batch.step).terms,
        torch.zeros(batch.num_tokens, dtype=torch.float64),
    )
    gates_J: list[Tensor] = []
    scales_J: list[Tensor] = []
    advantages_J: list[Tensor] = []
    for name in method.terms:
        term = now.get(name)
        if term is None:
            for columns in (gates_J, scales_J, advantages_J):
                columns.append(zeros_T)
            continue
        of_traces = reads_traces(term)
        counted_T = (batch.trace_T if of_traces else batch.sampled_T).double()
        gate_T = counted_T * gates(gates_of(term), batch)
        base_T = _averaged_over(term, counted_T, gate_T, batch)
        scale_T = gate_T * denominators(base_T, batch, term.aggregate, max_completion_tokens)
        if method.teacher_share and not of_traces:
            scale_T = scale_T * mixture_weights(method.teacher_share, batch)
        gates_J.append(gate_T)
        scales_J.append(scale_T * correction(getattr(term, "correction", None), batch))
        fixed_T = _fixed_part(term, batch, max_completion_tokens)
        whitens = isinstance(term, PolicyGradientTerm) and term.whiten
        advantages_J.append(whitened(fixed_T, counted_T > 0) if whitens else fixed_T)
    signals = batch.signals
    teacher, student = signals.teacher, signals.student
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


def _averaged_over(term: Term, counted_T: Tensor, gate_T: Tensor, batch: Batch) -> Tensor:
    """How much each token counts in a term's denominator, float64 [T]."""
    if isinstance(term, EntropyTerm):
        return counted_T
    match term.denominator:
        case "tokens":
            return counted_T
        case "gated":
            return gate_T
        case "all":
            return batch.written_T.double()
        case _:
            assert_never(term.denominator)


def mixture_weights(share: float, batch: Batch) -> Tensor:
    """p_student / ((1 - share) p_student + share p_teacher) of each token, float64 [T], at the
    step's first weights.

    What is drawn from the mixture then has the student's expectation. MiniLLM, arXiv 2306.08543,
    section 2.2, which weights a token for its own draw and not for those before it.
    """
    return 1.0 / (1.0 - share + share * log_ratio(batch.teacher_T, batch.old_T).exp())


def denominators(
    counted_T: Tensor, batch: Batch, aggregate: Aggregate, max_completion_tokens: int
) -> Tensor:
    """What a token's loss is multiplied with to make the aggregate, float64 [T].

    counted_T: float64, how much each token counts (0 or 1, or a gate). With n the tokens that
    count, N the sequences that have some, n_i those of the token's sequence: token-mean 1/n;
    seq-mean-token-mean 1/(N n_i); seq-mean-token-sum 1/N; seq-mean-token-sum-norm 1/(N
    max_completion_tokens); token-sum 1.
    """
    if aggregate == "token-sum":
        return torch.ones_like(counted_T)
    if aggregate == "token-mean":
        return torch.full_like(counted_T, 1.0) / counted_T.sum().clamp(
            min=torch.finfo(torch.float64).tiny
        )
    of_sequence_T = batch.over_sequences(counted_T)
    sequences = len(batch.sequence_T[of_sequence_T > 0].unique())
    if aggregate == "seq-mean-token-mean":
        return (1.0 / (max(sequences, 1) * of_sequence_T)).masked_fill(of_sequence_T == 0, 0.0)
    length = max_completion_tokens if aggregate == "seq-mean-token-sum-norm" else 1
    return torch.full_like(counted_T, 1.0 / (max(sequences, 1) * length))


def _fixed_part(term: Term, batch: Batch, max_completion_tokens: int) -> Tensor:
    """The sum of those of a term's weighted advantages that are known before the update, float64
    [T]."""
    total_T = torch.zeros(batch.num_tokens, dtype=torch.float64)
    for advantage in advantages_of(term).values():
        match advantage:
            case RewardAdvantage():
                value_T = _of_rewards(advantage, batch, max_completion_tokens)
            case ProcessRewardAdvantage():
                value_T = _of_process(advantage, batch)
            case LogRatioAdvantage():
                if not of_sequence(advantage):
                    continue
                value_T = _of_returns(advantage, batch)
            case ShapingAdvantage() | TopKAdvantage() | LogRatioFactor():
                continue  # of the present student: `loss` adds them
            case _:
                assert_never(advantage)
        total_T = total_T + weight_at(advantage.weight, batch.step) * value_T
    return total_T


def _of_rewards(advantage: RewardAdvantage, batch: Batch, max_completion_tokens: int) -> Tensor:
    rewards_N = batch.rewards_N + overlong_penalty(
        batch.lengths_N, max_completion_tokens, advantage.overlong
    )
    relative_N = group_advantages(rewards_N, batch.groups_N, advantage.normalise, advantage.std_eps)
    return batch.spread(relative_N)


def _of_returns(advantage: LogRatioAdvantage, batch: Batch) -> Tensor:
    model_T = batch.teacher_T if advantage.model == "teacher" else batch.reference_T
    delta_T = log_ratio(model_T, batch.old_T if advantage.anchor == "old" else batch.rollout_T)
    value_T = transformed(delta_T, advantage).masked_fill(~batch.sampled_T, 0.0)
    return batch.to_go(value_T, advantage.discount, mean=advantage.mean_to_go)


def _of_process(advantage: ProcessRewardAdvantage, batch: Batch) -> Tensor:
    """The sum, from a token on, of rewards relative to their mean in the others of the group
    (PRIME, Eq. 5)."""
    sampled_T = batch.sampled_T.double()
    reward_T = advantage.beta * (batch.process_T - batch.reference_T) * sampled_T
    mean_T = batch.over_sequences(reward_T) / batch.over_sequences(sampled_T).clamp(min=1)
    first_N = np.cumsum(batch.tokens_N) - batch.tokens_N
    mean_N = mean_T.numpy()[first_N]
    # r - mean of the others' = (r minus its own mean) + (its own mean minus the mean of the
    # others')
    relative_N = group_advantages(mean_N, batch.groups_N, "leave_one_out", eps=1.0)
    baseline_T = batch.spread(mean_N - relative_N)
    return batch.to_go((reward_T - baseline_T) * sampled_T, 1.0, mean=False)


def _column(values: np.ndarray | None) -> Tensor | None:
    if values is None:
        return None
    tensor = torch.from_numpy(values)
    return tensor.long() if np.issubdtype(values.dtype, np.integer) else tensor.float()
