"""From rows to micro-batches: who trains on which sequence, where its completion tokens sit,
and their columns.

Every rank holds all rows of a step, so denominators and advantages are global by construction;
a rank then takes its data-parallel share. The sequences of a micro-batch lie end to end and do not
see each other.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opd.contracts.rows import Row, Source
from megatron_opd.mcore.packing import Packing, local_positions
from megatron_opd.mcore.parallel import Parallel


@dataclass(frozen=True)
class Columns:
    """One number per completion token, in the order of the rows. A column that is `None` no term of
    the method reads."""

    ids_T: Tensor  # int64, the sampled token (or the trace's)
    scales_TJ: Tensor  # float32, one column per term: gate x correction / global denominator
    sequence_T: Tensor  # int64, the sequence a token belongs to
    sources_T: Tensor  # int8, who wrote the token (contracts.rows.Source)
    gates_TJ: Tensor | None = None  # float32, the gates alone, for the metrics
    # float32, the part of each term's advantage that the rewards make
    advantages_TJ: Tensor | None = None
    rollout_logprobs_T: Tensor | None = None  # float32, the engine's
    # float32, the trainer's at the start of the step; None: strictly on-policy
    old_logprobs_T: Tensor | None = None
    teacher_argmax_T: Tensor | None = None  # int64
    teacher_logprobs_T: Tensor | None = None  # float32, of ids_T
    topk_ids_TK: Tensor | None = None  # int64, the teacher's
    topk_logprobs_TK: Tensor | None = None  # float32, the teacher's
    reference_logprobs_T: Tensor | None = None  # float32, of ids_T
    drawn_T: Tensor | None = None  # bool, drawn by the student's engine; None: nobody asks
    parts: "Parts | None" = None  # where other ranks hold tokens of the same sequences

    @property
    def sampled_T(self) -> Tensor:
        """Bool [T], drawn for this text by the student or by the teacher in its place."""
        return self.sources_T <= Source.TEACHER

    def take(self, index_T: Tensor, parallel: Parallel) -> "Columns":
        """The tokens of a micro-batch that this rank holds, on its device. `self` has those of the
        whole update."""
        present: dict[str, Any] = {
            f.name: v for f in fields(self) if (v := getattr(self, f.name)) is not None
        }
        taken = {name: column[index_T].to(parallel.device) for name, column in present.items()}
        parts = Parts(self._num_sequences(), parallel.groups.cp) if parallel.cp_size > 1 else None
        return Columns(**taken, parts=parts)

    def over_sequences(self, values_JT: Tensor) -> Tensor:
        """For each token the sum over its whole sequence, [J, T], without a gradient. Collective
        where it has parts."""
        count = self.parts.num_sequences if self.parts else self._num_sequences()
        sums_JN = values_JT.new_zeros(len(values_JT), count).index_add(
            1, self.sequence_T, values_JT.detach()
        )
        if self.parts:
            dist.all_reduce(sums_JN, group=self.parts.group)
        return sums_JN[:, self.sequence_T]

    def _num_sequences(self) -> int:
        return int(self.sequence_T.max()) + 1 if len(self.sequence_T) else 0


@dataclass(frozen=True)
class Parts:
    """Context-parallel ranks hold parts of the same sequences."""

    num_sequences: int  # of the whole update
    group: dist.ProcessGroup


@dataclass(frozen=True)
class MicroBatch:
    """Some sequences end to end, on the device: this context-parallel rank's part of them."""

    tokens_1S: Tensor  # int64
    packing: Packing
    predict_T: Tensor  # int64 index into S: the position whose logits predict completion token t
    # int64, on the host: place of completion token t among the completion tokens of all rows
    index_T: Tensor


def token_offsets(rows: Sequence[Row]) -> np.ndarray:
    """int64 [N + 1]: the completion tokens of row i are those from offsets[i] to offsets[i + 1]."""
    return np.concatenate([[0], np.cumsum([r.num_tokens for r in rows], dtype=np.int64)])


def flatten(arrays: Sequence[np.ndarray], dtype: torch.dtype) -> Tensor:
    """Per-row arrays as one column."""
    return (
        torch.from_numpy(np.concatenate(arrays)).to(dtype)
        if arrays
        else torch.empty(0, dtype=dtype)
    )


def micro_batches(
    rows: Sequence[Row], parallel: Parallel, micro_batch_tokens: int
) -> list[MicroBatch]:
    """This rank's share of `rows`, the same number of micro-batches on every replica.

    A rank holds at most `micro_batch_tokens` tokens of a micro-batch (those of a part of each
    sequence under context parallelism), plus what fills up the last sequence. All micro-batches of
    all replicas are as equally long as whole sequences allow; one that has none gets a token of
    padding. Interleaved pipeline stages want a multiple of their number.
    """
    if not rows:
        return []
    offsets = token_offsets(rows)
    lengths = [parallel.layout.padded_length(len(r.prompt_ids) + r.num_tokens) for r in rows]
    multiple = parallel.pp_size if parallel.num_chunks > 1 else 1
    bins = balanced(lengths, parallel.dp_size, micro_batch_tokens * parallel.cp_size, multiple)
    return [_pack(rows, offsets, chosen, lengths, parallel) for chosen in bins[parallel.dp_rank]]


def balanced(
    lengths: Sequence[int], replicas: int, capacity: int, multiple: int = 1
) -> list[list[list[int]]]:
    """For each replica its micro-batches, each a list of indices into `lengths`, none above
    `capacity` tokens.

    As many micro-batches as it takes, in a multiple of `multiple`. The longest sequence goes to the
    emptiest micro-batch, then the next. `capacity` must hold the longest.
    """
    assert max(lengths) <= capacity, "checked with the recipe"
    count = -(-sum(lengths) // (replicas * capacity))
    while True:
        count = -(-count // multiple) * multiple
        loads, bins = _fill(lengths, replicas * count)
        if max(loads) <= capacity:
            break
        count = max(count + 1, count * 21 // 20)
    # The fullest of all are the replicas' first ones, and so on; every second time in the other
    # direction.
    order = sorted(range(len(bins)), key=lambda i: -loads[i])
    rounds = [order[i : i + replicas] for i in range(0, len(order), replicas)]
    dealt = [each if number % 2 == 0 else each[::-1] for number, each in enumerate(rounds)]
    return [[sorted(bins[each[replica]]) for each in dealt] for replica in range(replicas)]


def _fill(lengths: Sequence[int], count: int) -> tuple[list[int], list[list[int]]]:
    """Tokens and members of each of `count` micro-batches."""
    bins: list[list[int]] = [[] for _ in range(count)]
    heap = [(0, i) for i in range(count)]
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        load, emptiest = heap[0]
        bins[emptiest].append(index)
        heapq.heapreplace(heap, (load + lengths[index], emptiest))
    loads = [0] * count
    for load, i in heap:
        loads[i] = load
    return loads, bins


def _pack(
    rows: Sequence[Row],
    offsets: np.ndarray,
    chosen: Sequence[int],
    padded: Sequence[int],
    parallel: Parallel,
) -> MicroBatch:
    cp_size, cp_rank = parallel.cp_size, parallel.cp_rank
    lengths = _filled_up(
        [padded[i] for i in chosen] or [parallel.layout.padded_length(1)], parallel
    )
    tokens = [np.zeros(length, dtype=np.int64) for length in lengths]
    predict, index, start = [], [], 0
    for place, i in enumerate(chosen):
        prompt, completion = rows[i].prompt_ids, rows[i].token_ids
        tokens[place][: len(prompt) + len(completion)] = np.concatenate([prompt, completion])
        # Completion token t is predicted at position len(prompt) - 1 + t.
        token_S = local_positions(lengths[place], cp_size, cp_rank) - (len(prompt) - 1)
        inside = np.flatnonzero((token_S >= 0) & (token_S < len(completion)))
        predict.append(start + inside)
        index.append(offsets[i] + token_S[inside])
        start += len(token_S)
    mine = [ids[local_positions(len(ids), cp_size, cp_rank)] for ids in tokens]
    return MicroBatch(
        tokens_1S=flatten(mine, torch.long)[None].to(parallel.device),
        packing=Packing.of(lengths, cp_size, cp_rank, parallel.device),
        predict_T=flatten(predict, torch.long).to(parallel.device),
        index_T=flatten(index, torch.long),
    )


def _filled_up(lengths: list[int], parallel: Parallel) -> list[int]:
    """Sequence parallelism gives every tensor-parallel rank an equal part of a row: the last
    sequence grows."""
    parts = parallel.tp_size if parallel.layout.sequence_parallel else 1
    step = parallel.layout.padded_length(1)
    while sum(lengths) % (parts * parallel.cp_size):
        lengths[-1] += step
    return lengths
