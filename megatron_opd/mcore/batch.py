"""Micro-batches: their sequences, the places of the completion tokens, and those tokens' columns.

Every rank holds all rows of a step, so denominators and advantages are global by construction;
a rank then takes its data-parallel share. The sequences of a micro-batch lie end to end and do not
see each other.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opd.contracts.rows import Row, Source
from megatron_opd.mcore.packing import Packing, local_positions
from megatron_opd.mcore.parallel import Parallel


@dataclass(frozen=True)
class Columns:
    """The columns of an update: one number per completion token, in row order.

    A column that no term of the method reads is None.
    """

    ids_T: Tensor  # int64, the sampled token (or the trace's)
    scales_TJ: Tensor  # float32, one column per term: gate x correction / global denominator
    sequence_T: Tensor  # int64, the sequence a token belongs to
    sources_T: Tensor  # int8, who wrote the token (contracts.rows.Source)
    gates_TJ: Tensor | None = None  # float32, the gates alone, for the metrics
    advantages_TJ: Tensor | None = None  # float32, what rewards add to each term's advantage
    rollout_logprobs_T: Tensor | None = None  # float32, the engine's
    # float32, the trainer's at the start of the step; None when strictly on-policy
    old_logprobs_T: Tensor | None = None
    teacher_argmax_T: Tensor | None = None  # int64
    teacher_logprobs_T: Tensor | None = None  # float32, of ids_T
    topk_ids_TK: Tensor | None = None  # int64, the teacher's
    topk_logprobs_TK: Tensor | None = None  # float32, the teacher's
    reference_logprobs_T: Tensor | None = None  # float32, of ids_T
    drawn_T: Tensor | None = None  # bool, drawn by the student's engine; None if no term reads it
    slices: "Slices | None" = None  # set where other ranks hold tokens of the same sequences

    @property
    def sampled_T(self) -> Tensor:
        """Bool [T], drawn for this text by the student or by the teacher in its place."""
        return self.sources_T <= Source.TEACHER

    @property
    def written_T(self) -> Tensor:
        """Bool [T], by anyone but an environment."""
        return self.sources_T != Source.ENVIRONMENT

    def take(self, index_T: Tensor, parallel: Parallel) -> "Columns":
        """The columns of some tokens of the update, on this rank's device."""
        taken: dict[str, Tensor] = {}
        for field in fields(self):
            column = getattr(self, field.name)
            if column is not None:
                taken[field.name] = column[index_T].to(parallel.device)
        sliced = parallel.cp_size > 1
        slices = Slices(self._num_sequences(), parallel.groups.cp) if sliced else None
        return Columns(**taken, slices=slices)

    def over_sequences(self, values_JT: Tensor) -> Tensor:
        """The sum over each token's whole sequence, [J, T], without a gradient.

        Collective over the context-parallel group if the sequences are sliced.
        """
        count = self.slices.num_sequences if self.slices else self._num_sequences()
        zeros_JN = values_JT.new_zeros(len(values_JT), count)
        sums_JN = zeros_JN.index_add(1, self.sequence_T, values_JT.detach())
        if self.slices:
            dist.all_reduce(sums_JN, group=self.slices.group)
        return sums_JN[:, self.sequence_T]

    def _num_sequences(self) -> int:
        return int(self.sequence_T.max()) + 1 if len(self.sequence_T) else 0


@dataclass(frozen=True)
class Slices:
    """The group whose context-parallel ranks hold slices of the same sequences."""

    num_sequences: int  # of the whole update
    group: dist.ProcessGroup


@dataclass(frozen=True)
class MicroBatch:
    """Some sequences end to end, on the device: this context-parallel rank's slices of them."""

    tokens_1S: Tensor  # int64
    packing: Packing
    predict_T: Tensor  # int64 index into S: the position whose logits predict completion token t
    index_T: Tensor  # int64, on the host: completion token t's number among those of all rows
    rows: Sequence[Row] = ()  # whose tokens they are, in their order


def token_offsets(rows: Sequence[Row]) -> np.ndarray:
    """int64 [N + 1]: row i has the completion tokens offsets[i]:offsets[i + 1]."""
    return np.concatenate([[0], np.cumsum([r.num_tokens for r in rows], dtype=np.int64)])


def flatten(arrays: Sequence[np.ndarray], dtype: torch.dtype) -> Tensor:
    """Per-row arrays as one column."""
    if not arrays:
        return torch.empty(0, dtype=dtype)
    return torch.from_numpy(np.concatenate(arrays)).to(dtype)


def micro_batches(
    rows: Sequence[Row], parallel: Parallel, micro_batch_tokens: int
) -> list[MicroBatch]:
    """This rank's share of `rows`: the same number of micro-batches on every replica.

    A rank holds at most `micro_batch_tokens` tokens of a micro-batch (those of its slices under
    context parallelism), plus padding at the end of the last sequence. All micro-batches of all
    replicas are as equally long as whole sequences allow; one without a sequence gets a token of
    padding. Interleaved pipeline stages need a multiple of their number.
    """
    if not rows:
        return []
    offsets = token_offsets(rows)
    padded = parallel.layout.padded_length
    lengths = [padded(len(r.prompt_ids) + r.num_tokens) for r in rows]
    multiple = parallel.pp_size if parallel.num_chunks > 1 else 1
    capacity = micro_batch_tokens * parallel.cp_size
    own = balanced(lengths, parallel.dp_size, capacity, multiple)[parallel.dp_rank]
    return [_pack(rows, offsets, chosen, lengths, parallel) for chosen in own]


def one_micro_batch(rows: Sequence[Row], parallel: Parallel) -> MicroBatch:
    """A micro-batch of these rows, in their order, for this rank's replica alone."""
    lengths = [parallel.layout.padded_length(len(r.prompt_ids) + r.num_tokens) for r in rows]
    return _pack(rows, token_offsets(rows), range(len(rows)), lengths, parallel)


def balanced(
    lengths: Sequence[int], replicas: int, capacity: int, multiple: int = 1
) -> list[list[list[int]]]:
    """Deals sequences out: replica -> micro-batches -> indices into `lengths`.

    No micro-batch has more than `capacity` tokens, which must hold the longest sequence. A replica
    gets as many of them as that takes, in a multiple of `multiple`. The longest sequence goes to
    the emptiest micro-batch, then the next longest.
    """
    assert max(lengths) <= capacity, "checked with the recipe"
    count = -(-sum(lengths) // (replicas * capacity))
    while True:
        count = -(-count // multiple) * multiple
        loads, bins = _fill(lengths, replicas * count)
        if max(loads) <= capacity:
            break
        count = max(count + 1, count * 21 // 20)
    # The fullest micro-batches are the replicas' first ones, the next fullest their second ones
    # with the replicas in the opposite order, and so on.
    order = sorted(range(len(bins)), key=lambda i: -loads[i])
    rounds = [order[i : i + replicas] for i in range(0, len(order), replicas)]
    for number in range(1, len(rounds), 2):
        rounds[number].reverse()
    return [[sorted(bins[dealt[replica]]) for dealt in rounds] for replica in range(replicas)]


def _fill(lengths: Sequence[int], count: int) -> tuple[list[int], list[list[int]]]:
    """The number of tokens, and the sequences, of each of `count` micro-batches."""
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
    """The micro-batch of the rows `chosen`, whose sequences get the lengths `padded`."""
    cp_size = parallel.cp_size
    cp_rank = parallel.cp_rank
    lengths = [padded[i] for i in chosen] or [parallel.layout.padded_length(1)]
    lengths = _filled_up(lengths, parallel)
    tokens = [np.zeros(length, dtype=np.int64) for length in lengths]
    predict = []
    index = []
    start = 0
    for place, i in enumerate(chosen):
        prompt = rows[i].prompt_ids
        completion = rows[i].token_ids
        tokens[place][: len(prompt) + len(completion)] = np.concatenate([prompt, completion])
        # Completion token t is predicted at position len(prompt) - 1 + t.
        token_S = local_positions(lengths[place], cp_size, cp_rank) - (len(prompt) - 1)
        inside = np.flatnonzero((token_S >= 0) & (token_S < len(completion)))
        predict.append(start + inside)
        index.append(offsets[i] + token_S[inside])
        start += len(token_S)
    own = [sequence[local_positions(len(sequence), cp_size, cp_rank)] for sequence in tokens]
    return MicroBatch(
        tokens_1S=flatten(own, torch.long)[None].to(parallel.device),
        packing=Packing.of(lengths, cp_size, cp_rank, parallel.device),
        predict_T=flatten(predict, torch.long).to(parallel.device),
        index_T=flatten(index, torch.long),
        rows=[rows[i] for i in chosen],
    )


def _filled_up(lengths: list[int], parallel: Parallel) -> list[int]:
    """The lengths with a longer last one, so that the sum divides among the ranks.

    Sequence parallelism gives every tensor-parallel rank as many tokens.
    """
    ranks = parallel.tp_size if parallel.layout.sequence_parallel else 1
    step = parallel.layout.padded_length(1)
    while sum(lengths) % (ranks * parallel.cp_size):
        lengths[-1] += step
    return lengths
