"""From rollouts to micro-batches: who trains on which sequence, where its completion tokens sit, and their columns.

Every rank holds all rollouts of a step, so denominators and advantages are global by construction; a rank then takes
its data-parallel share. Sequences of similar length share a micro-batch and are padded on the right.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_opd.mcore.parallel import Parallel
from megatron_opd.records import Rollout


@dataclass(frozen=True)
class Columns:
    """One row per completion token, in rollout order. `None`: no term of the method reads it."""

    ids_T: Tensor  # int64, the sampled token (or the trace's)
    scales_TJ: Tensor  # float32, one column per term: gate x correction / global denominator
    sequence_T: Tensor  # int64, the sequence a token belongs to
    sampled_T: Tensor  # bool, the student's own token, not one of a trace or a prefix
    gates_TJ: Tensor | None = None  # float32, the gates alone, for the metrics
    advantages_TJ: Tensor | None = None  # float32, the part of each term's advantage that the rewards make
    rollout_logprobs_T: Tensor | None = None  # float32, the engine's
    old_logprobs_T: Tensor | None = None  # float32, the trainer's at the start of the step; None: strictly on-policy
    teacher_argmax_T: Tensor | None = None  # int64
    teacher_logprobs_T: Tensor | None = None  # float32, of ids_T
    topk_ids_TK: Tensor | None = None  # int64, the teacher's
    topk_logprobs_TK: Tensor | None = None  # float32, the teacher's
    reference_logprobs_T: Tensor | None = None  # float32, of ids_T
    by_teacher_T: Tensor | None = None  # bool, sampled by the teacher in the student's place

    def take(self, rows_T: Tensor, device: torch.device) -> "Columns":
        present: dict[str, Any] = {f.name: v for f in fields(self) if (v := getattr(self, f.name)) is not None}
        return Columns(**{name: column[rows_T].to(device) for name, column in present.items()})


@dataclass(frozen=True)
class MicroBatch:
    """Some sequences, padded to one length, on the device."""

    tokens_BS: Tensor  # int64
    positions_BS: Tensor  # int64
    predict_T: Tensor  # int64 index into the flattened [B * S]: the position whose logits predict completion token t
    rows_T: Tensor  # int64, on the host: row of completion token t among all the rollouts' completion tokens

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.tokens_BS.shape)  # type: ignore[return-value]


def token_offsets(rollouts: Sequence[Rollout]) -> np.ndarray:
    """int64 [N + 1]: completion tokens of rollout i are rows offsets[i]:offsets[i + 1]."""
    return np.concatenate([[0], np.cumsum([r.num_tokens for r in rollouts], dtype=np.int64)])


def flatten(arrays: Sequence[np.ndarray], dtype: torch.dtype) -> Tensor:
    """Per-rollout arrays as one column."""
    return torch.from_numpy(np.concatenate(arrays)).to(dtype) if arrays else torch.empty(0, dtype=dtype)


def micro_batches(rollouts: Sequence[Rollout], parallel: Parallel, micro_batch_size: int) -> list[MicroBatch]:
    """This rank's share of `rollouts`: the same number of micro-batches, of the same shapes, on every replica.

    Sorted by length, each window of (replicas x micro_batch_size) sequences becomes one micro-batch per replica; the
    last window is filled up with sequences of one token and no completion. Interleaved pipeline stages want a multiple
    of their number: the rest are micro-batches of such sequences.
    """
    offsets = token_offsets(rollouts)
    lengths = np.array([len(r.prompt.token_ids) + r.num_tokens for r in rollouts], dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    window = parallel.dp_size * micro_batch_size
    batches = []
    for start in range(0, len(order), window):
        longest = int(lengths[order[start]])
        mine = order[start:][parallel.dp_rank :: parallel.dp_size][:micro_batch_size]
        batches.append(_pad(rollouts, offsets, mine, micro_batch_size, _padded_length(longest, parallel), parallel))
    while batches and parallel.num_chunks > 1 and len(batches) % parallel.pp_size:
        nobody = np.empty(0, dtype=np.int64)
        batches.append(_pad(rollouts, offsets, nobody, micro_batch_size, _padded_length(1, parallel), parallel))
    return batches


def _padded_length(length: int, parallel: Parallel) -> int:
    """Sequence parallelism gives every tensor-parallel rank an equal part of the sequence."""
    multiple = parallel.tp_size if parallel.layout.sequence_parallel else 1
    return -(-length // multiple) * multiple


def _pad(
    rollouts: Sequence[Rollout], offsets: np.ndarray, chosen: np.ndarray, rows: int, length: int, parallel: Parallel
) -> MicroBatch:
    tokens_BS = np.zeros((rows, length), dtype=np.int64)
    predict, source = [], []
    for row, i in enumerate(chosen):
        prompt, completion = rollouts[i].prompt.token_ids, rollouts[i].token_ids
        start, end = len(prompt), len(prompt) + len(completion)
        tokens_BS[row, :start] = prompt
        tokens_BS[row, start:end] = completion
        predict.append(row * length + np.arange(start - 1, end - 1))
        source.append(np.arange(offsets[i], offsets[i + 1]))
    positions_BS = torch.arange(length, device=parallel.device).expand(rows, length)
    return MicroBatch(
        tokens_BS=torch.from_numpy(tokens_BS).to(parallel.device),
        positions_BS=positions_BS,
        predict_T=flatten(predict, torch.long).to(parallel.device),
        rows_T=flatten(source, torch.long),
    )
