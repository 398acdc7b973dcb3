"""Ids whose probability another id gets, by a change of the logits.

With z the logits over the temperature, q their softmax, and A the ids that become id b,

    z'_b = log(e^z_b + sum_(a in A) e^z_a)        z'_a = -inf        all others as they are

has the same sum of exponentials, so q'_b = q_b + sum_A q_a, q'_a = 0, and nothing else changes:
entropy, top-k and divergences of the logits are those of q'.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opd.contracts.merged_ids import MergedIds
from megatron_opd.vocab_parallel.shards import Group, size


def rows_of(weight_VD: Tensor, merged: MergedIds, group: Group) -> Tensor:
    """The output layer's rows, [1 + A, D]: the id that gets probability, then those that give it.

    They are equal on every rank. One collective if the rows are split over a group.
    """
    ids = [merged.into, *merged.ids]
    first = 0 if group is None else group.rank() * len(weight_VD)
    rows_ED = weight_VD.new_zeros(len(ids), weight_VD.shape[1])
    for place, index in enumerate(ids):
        if first <= index < first + len(weight_VD):
            rows_ED[place] = weight_VD[index - first]
    if size(group) > 1:
        dist.all_reduce(rows_ED, group=group)
    return rows_ED


def merge_logits(
    logits_TV: Tensor,
    hidden_TD: Tensor,
    rows_ED: Tensor,
    merged: MergedIds,
    *,
    first_id: int,
    temperature: float,
) -> None:
    """Changes a shard's logits in place; its first id is `first_id`, `rows_ED` from `rows_of`."""
    width = logits_TV.shape[1]
    for index in merged.ids:
        if first_id <= index < first_id + width:
            logits_TV[:, index - first_id] = -torch.inf
    if first_id <= merged.into < first_id + width:
        wide = torch.float64 if logits_TV.dtype == torch.float64 else torch.float32
        z_TE = (hidden_TD @ rows_ED.T).to(wide) / temperature
        merged_T = z_TE.logsumexp(dim=1) * temperature
        logits_TV[:, merged.into - first_id] = merged_T.to(logits_TV.dtype)
