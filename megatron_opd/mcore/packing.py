"""Sequences end to end in one row of tokens, and a context-parallel rank's slices of them.

With context parallelism of size C every sequence is cut into 2C equal slices, and rank r holds the
slices r and 2C - 1 - r: a token meets all tokens before it, so a first and a last slice together
are as much work as any other such pair.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


@dataclass(frozen=True)
class Runs:
    """Runs of rows that lie end to end."""

    lengths: np.ndarray  # int64 [B]
    device: torch.device

    @cached_property
    def longest(self) -> int:
        return int(self.lengths.max())

    @cached_property
    def equal(self) -> bool:
        """True when all runs are equally long."""
        return bool((self.lengths == self.lengths[0]).all())

    @cached_property
    def bounds(self) -> Tensor:
        """int32 [B + 1]: the first row of each run, and the end, as varlen kernels want them."""
        return _bounds(self.lengths, self.device)

    @cached_property
    def padded(self) -> Tensor:
        """int64 [B * longest]: the rows of each run, filled up with its last row."""
        starts = np.cumsum(self.lengths) - self.lengths
        inside_BL = np.minimum(np.arange(self.longest)[None], self.lengths[:, None] - 1)
        return torch.from_numpy((starts[:, None] + inside_BL).ravel()).to(self.device)

    @cached_property
    def packed(self) -> Tensor:
        """int64 [rows]: the place of each row in `padded`."""
        rows_BL = np.arange(self.longest)[None] < self.lengths[:, None]
        return torch.from_numpy(np.flatnonzero(rows_BL)).to(self.device)


@dataclass(frozen=True)
class Segments:
    """Runs of queries, each with a run of keys.

    The last key of a run belongs to its last query; a run of keys is never the shorter one.
    """

    queries: Runs
    keys: Runs

    @cached_property
    def visible(self) -> Tensor:
        """bool [B, 1, longest queries, longest keys]: the keys that each query attends to.

        It is for the padded batch of the segments.
        """
        keys = self.keys
        before_B = keys.lengths - self.queries.lengths
        place_BQ = before_B[:, None] + np.arange(self.queries.longest)[None]
        visible_BQK = np.arange(keys.longest) <= place_BQ[:, :, None]
        return torch.from_numpy(visible_BQK)[:, None].to(keys.device)


@dataclass
class Packing(PackedSeqParams):
    """Positions and segments of a packed row of tokens, made by `of`.

    Megatron hands it unchanged to the rotary embedding and the core attention of the local layers,
    because its format leaves positions and segments to them.
    """

    lengths: Sequence[int] = ()  # of whole sequences, padding included
    positions_S: Tensor | None = None  # int64, the places in their sequences of this rank's tokens
    segments: Segments | None = None
    # int64, the rows of all ranks' keys that `segments` runs over; None for the rank's own keys
    keys_U: Tensor | None = None

    @classmethod
    def of(
        cls, lengths: Sequence[int], cp_size: int, cp_rank: int, device: torch.device
    ) -> "Packing":
        """The packing of sequences of these lengths, which are multiples of 2C if C > 1."""
        positions = [local_positions(length, cp_size, cp_rank) for length in lengths]
        segments, keys = _segments(lengths, cp_size, cp_rank, device)
        return cls(
            qkv_format="sbhd",
            lengths=tuple(lengths),
            positions_S=torch.from_numpy(np.concatenate(positions)).to(device),
            segments=segments,
            keys_U=keys,
        )

    def thd(self) -> PackedSeqParams:
        """The packing for Transformer Engine, whose layers slice sequences as `local_positions`."""
        assert self.positions_S is not None, "made by Packing.of"
        bounds = _bounds(np.array(self.lengths), self.positions_S.device)
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=bounds,
            cu_seqlens_kv=bounds,
            max_seqlen_q=max(self.lengths),
            max_seqlen_kv=max(self.lengths),
        )


def local_positions(length: int, cp_size: int, cp_rank: int) -> np.ndarray:
    """int64: the places that a context-parallel rank holds of a sequence of `length` tokens.

    They are in ascending order.
    """
    if cp_size == 1:
        return np.arange(length)
    slices = np.arange(length).reshape(2 * cp_size, -1)
    return np.concatenate([slices[cp_rank], slices[-1 - cp_rank]])


def _segments(
    lengths: Sequence[int], cp_size: int, cp_rank: int, device: torch.device
) -> tuple[Segments, Tensor | None]:
    if cp_size == 1:
        whole = Runs(np.asarray(lengths, dtype=np.int64), device)
        return Segments(whole, whole), None
    # The row of each token of the whole sequences among the gathered keys, rank after rank.
    gathered = [_row_positions(lengths, cp_size, rank) for rank in range(cp_size)]
    row_of = np.argsort(np.concatenate(gathered), kind="stable")
    queries = []
    keys = []
    rows = []
    start = 0
    for length in lengths:
        slice_length = length // (2 * cp_size)
        for index in (cp_rank, 2 * cp_size - 1 - cp_rank):
            queries.append(slice_length)
            keys.append((index + 1) * slice_length)
            rows.append(row_of[start : start + keys[-1]])
        start += length
    segments = Segments(Runs(np.array(queries), device), Runs(np.array(keys), device))
    return segments, torch.from_numpy(np.concatenate(rows)).to(device)


def _row_positions(lengths: Sequence[int], cp_size: int, cp_rank: int) -> np.ndarray:
    """The places that a rank holds, counted through all sequences."""
    starts = np.cumsum([0, *lengths[:-1]])
    positions = [local_positions(length, cp_size, cp_rank) for length in lengths]
    return np.concatenate([start + own for start, own in zip(starts, positions, strict=True)])


def _bounds(lengths: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)).to(device)
