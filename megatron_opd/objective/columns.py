"""Per-token columns of a batch: group advantages and the global denominators of every term. NumPy in float64.

Every rank sees all rollouts of the update, so nothing here depends on the layout or on micro-batches.
"""

from collections.abc import Sequence

import numpy as np
import torch

from megatron_opd.config.schema import Aggregate, MethodConfig, PolicyGradientTerm
from megatron_opd.mcore.batch import Columns, flatten
from megatron_opd.objective.plan import plan
from megatron_opd.records import Rollout, TeacherSignals


def group_advantages(rewards_N: np.ndarray, groups_N: np.ndarray, normalise: str, eps: float) -> np.ndarray:
    """(r - mean of its group) / (std of its group + eps), float64 [N]; `mean` only centres.

    `groups_N` names each rollout's group. The standard deviation is the unbiased one, as in the implementations the
    papers ran; a group of equal rewards, or of one rollout, gets 0. Source: GRPO, arXiv 2402.03300, section 4.1.2.
    """
    advantages_N = np.zeros(len(rewards_N), dtype=np.float64)
    for group in np.unique(groups_N):
        members = groups_N == group
        centred = rewards_N[members] - rewards_N[members].mean()
        if normalise == "std" and members.sum() > 1:
            centred = centred / (centred.std(ddof=1) + eps)
        advantages_N[members] = centred
    return advantages_N


def token_scales(lengths_N: np.ndarray, aggregate: Aggregate) -> np.ndarray:
    """One over the denominator of each token, float64 [T]; adds up to 1 over the batch.

    token-mean: 1 / (all tokens). seq-mean-token-mean: 1 / (sequences x tokens of the sequence).
    """
    if aggregate == "token-mean":
        return np.full(lengths_N.sum(), 1.0 / max(lengths_N.sum(), 1))
    return np.repeat(1.0 / (np.count_nonzero(lengths_N) * np.maximum(lengths_N, 1)), lengths_N)


def build_columns(method: MethodConfig, rollouts: Sequence[Rollout], teacher: TeacherSignals | None) -> Columns:
    """The columns that the terms of `method` read, for all completion tokens of `rollouts`."""
    lengths_N = np.array([r.num_tokens for r in rollouts], dtype=np.int64)
    scales_TJ = np.stack([token_scales(lengths_N, term.aggregate) for term in method.terms.values()], axis=1)
    advantages_T = None
    for term in method.terms.values():
        if isinstance(term, PolicyGradientTerm):
            rewards_N = np.array([r.reward for r in rollouts], dtype=np.float64)
            groups_N = np.array([r.group for r in rollouts])
            advantages_N = group_advantages(rewards_N, groups_N, term.normalise, term.std_eps)
            advantages_T = torch.from_numpy(np.repeat(advantages_N, lengths_N)).float()
    return Columns(
        ids_T=flatten([r.token_ids for r in rollouts], torch.long),
        scales_TJ=torch.from_numpy(scales_TJ).float(),
        rollout_logprobs_T=flatten([r.logprobs for r in rollouts], torch.float32) if plan(method).rollouts else None,
        advantages_T=advantages_T,
        teacher_argmax_T=None if teacher is None else torch.from_numpy(teacher.argmax_ids_T).long(),
    )
