"""Sequences end to end in one row of tokens, and which of these tokens a context-parallel rank
holds.

With context parallelism of size C every sequence is cut into 2C equal chunks, and rank r holds the
chunks r and 2C - 1 - r: a token meets all tokens before it, so a first and a last chunk together
are as much work as any other pair.
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
    """Rows that lie end to end in runs."""

    lengths: np.ndarray  # int64 [B]
    device: torch.device

    @cached_property
    def longest(self) -> int:
        return int(self.lengths.max())

    @cached_property
    def equal(self) -> bool:
        """Whether all are equally long."""
        return bool((self.lengths == self.lengths[0]).all())

    @cached_property
    def bounds(self) -> Tensor:
        """int32 [B + 1]: where sequences begin and end, as varlen kernels want it."""
        return _bounds(self.lengths, self.device)

    @cached_property
    def padded(self) -> Tensor:
        """int64 [B * longest]: the rows of each run, which is filled up with its last one."""
        starts = np.cumsum(self.lengths) - self.lengths
        inside_BL = np.minimum(np.arange(self.longest)[None], self.lengths[:, None] - 1)
        return torch.from_numpy((starts[:, None] + inside_BL).ravel()).to(self.device)

    @cached_property
    def packed(self) -> Tensor:
        """The inverse of `padded`, int64 [rows]."""
        rows_BL = np.arange(self.longest)[None] < self.lengths[:, None]
        return torch.from_numpy(np.flatnonzero(rows_BL)).to(self.device)


@dataclass(frozen=True)
class Segments:
    """Runs of queries, each with its run of keys whose last one belongs to its last query: none is
    shorter."""

    queries: Runs
    keys: Runs

    @cached_property
    def visible(self) -> Tensor:
        """bool [B, 1, longest queries, longest keys]: the keys each query of a padded batch attends
        to."""
        queries, keys = self.queries, self.keys
        place_BQ1 = (keys.lengths - queries.lengths)[:, None, None] + np.arange(queries.longest)[
            None, :, None
        ]
        return torch.from_numpy(np.arange(keys.longest) <= place_BQ1)[:, None].to(keys.device)


@dataclass
class Packing(PackedSeqParams):
    """What a model must know of a packed row of tokens; `of` makes it.

    Megatron hands it to the rotary embedding and the core attention of the local layers as it is:
    its format says that positions and segments are theirs to deal with.
    """

    lengths: Sequence[int] = ()  # of whole sequences, padding included
    # int64, the place in its sequence of each token that this rank holds
    positions_S: Tensor | None = None
    segments: Segments | None = None
    # int64, rows of all ranks' keys that `segments` runs over; None: one's own keys
    keys_U: Tensor | None = None

    @classmethod
    def of(
        cls, lengths: Sequence[int], cp_size: int, cp_rank: int, device: torch.device
    ) -> "Packing":
        """`lengths` [N]: each a multiple of 2C where C > 1."""
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
        """The same in Transformer Engine's words, whose layers share out sequences among ranks as
        `local_positions`."""
        assert self.positions_S is not None, "made by Packing.of"
        bounds, longest = (
            _bounds(np.array(self.lengths), self.positions_S.device),
            max(self.lengths),
        )
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=bounds,
            cu_seqlens_kv=bounds,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )


def local_positions(length: int, cp_size: int, cp_rank: int) -> np.ndarray:
    """int64: the places of a sequence of `length` tokens that a context-parallel rank holds, in
    ascending order."""
    if cp_size == 1:
        return np.arange(length)
    chunks = np.arange(length).reshape(2 * cp_size, -1)
    return np.concatenate([chunks[cp_rank], chunks[-1 - cp_rank]])


def _segments(
    lengths: Sequence[int], cp_size: int, cp_rank: int, device: torch.device
) -> tuple[Segments, Tensor | None]:
    if cp_size == 1:
        whole = Runs(np.asarray(lengths, dtype=np.int64), device)
        return Segments(whole, whole), None
    # Row of the gathered keys, rank after rank, in which each token of the whole sequences lies.
    held = [_row_positions(lengths, cp_size, rank) for rank in range(cp_size)]
    row_of = np.argsort(np.concatenate(held), kind="stable")
    queries, keys, rows = [], [], []
    start = 0
    for length in lengths:
        chunk = length // (2 * cp_size)
        for last in (cp_rank, 2 * cp_size - 1 - cp_rank):
            queries.append(chunk)
            keys.append((last + 1) * chunk)
            rows.append(row_of[start : start + keys[-1]])
        start += length
    segments = Segments(*(Runs(np.array(each), device) for each in (queries, keys)))
    return segments, torch.from_numpy(np.concatenate(rows)).to(device)


def _row_positions(lengths: Sequence[int], cp_size: int, cp_rank: int) -> np.ndarray:
    """The places that a rank holds, counted through all sequences."""
    starts = np.cumsum([0, *lengths[:-1]])
    pairs = zip(starts, lengths, strict=True)
    return np.concatenate(
        [start + local_positions(length, cp_size, cp_rank) for start, length in pairs]
    )


def _bounds(lengths: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)).to(device)
