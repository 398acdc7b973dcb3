"""Packed micro-batches: who gets which tokens; attention that stays within a sequence, on one rank
or several."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_opd.architectures.config import LayoutConfig
from megatron_opd.contracts.rows import Row
from megatron_opd.mcore import parallel as groups
from megatron_opd.mcore.attention import causal_attention
from megatron_opd.mcore.batch import MicroBatch, balanced, micro_batches, token_offsets
from megatron_opd.mcore.packing import Packing, local_positions
from megatron_opd.mcore.parallel import Parallel
from megatron_opd.planning.states import world_of_one
from tests.rows import row, task

HOST = torch.device("cpu")


# ---------------------------------------------------------------------------------------- attention
def rows(tokens: int, heads: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, heads, 8, generator=generator, dtype=torch.float64).requires_grad_()


def dense(query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor, lengths: list[int]) -> Tensor:
    """Sequence by sequence, softmax written out."""
    out = []
    for query, key, value in zip(
        *(x.split(lengths) for x in (query_THD, key_TGD, value_TGD)), strict=True
    ):
        shared = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(shared, dim=1) for x in (key, value))
        scores_HQK = torch.einsum("qhd,khd->hqk", query, key) / 8**0.5
        hidden = torch.ones(len(query), len(query), dtype=torch.bool).triu(1)
        out.append(
            torch.einsum(
                "hqk,khd->qhd", scores_HQK.masked_fill(hidden, -torch.inf).softmax(-1), value
            )
        )
    return torch.cat(out)


def shards(x: Tensor, lengths: list[int], ranks: int) -> list[Tensor]:
    """What each context-parallel rank holds of packed rows."""
    of = lambda part, rank: part[local_positions(len(part), ranks, rank)]  # noqa: E731
    return [torch.cat([of(part, rank) for part in x.split(lengths)]) for rank in range(ranks)]


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=["heads", "grouped"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("lengths", [[12], [12, 12], [36, 12, 24, 12]], ids=str)
def test_attention_stays_within_a_sequence(
    lengths: list[int], ranks: int, heads: tuple[int, int]
) -> None:
    if ranks == 1:
        lengths = [each - i for i, each in enumerate(lengths)] if len(lengths) > 2 else lengths
    inputs = [rows(sum(lengths), each, seed) for seed, each in enumerate((*heads, heads[1]))]
    weights = rows(sum(lengths), heads[0], 9).detach()
    want = dense(*inputs, lengths)
    wanted_grads = torch.autograd.grad((want * weights).sum(), inputs)

    parts, loss = [shards(x, lengths, ranks) for x in inputs], torch.zeros((), dtype=torch.float64)
    for rank in range(ranks):
        packing = Packing.of(lengths, ranks, rank, HOST)
        key, value = (torch.cat(part) for part in parts[1:])  # as gathered from all ranks
        if packing.keys_U is not None:
            key, value = key[packing.keys_U], value[packing.keys_U]
        got = causal_attention(parts[0][rank], key, value, packing.segments, None)
        torch.testing.assert_close(got, shards(want, lengths, ranks)[rank], rtol=0, atol=1e-12)
        loss = loss + (got * shards(weights, lengths, ranks)[rank]).sum()
    for grad, wanted in zip(torch.autograd.grad(loss, inputs), wanted_grads, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=0, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_kernel_for_packed_rows_equals_the_padded_batch(ranks: int) -> None:
    lengths, device = [32, 8, 20], torch.device("cuda")
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(60, h, 64, generator=generator).to(device) for h in (4, 2, 2))
    for rank in range(ranks):
        packing = Packing.of(lengths, ranks, rank, device)
        k, v = (
            x if packing.keys_U is None else torch.cat(shards(x, lengths, ranks))[packing.keys_U]
            for x in (key, value)
        )
        q = shards(query, lengths, ranks)[rank]
        whole = causal_attention(q, k, v, packing.segments, None)
        kernel = causal_attention(*(x.bfloat16() for x in (q, k, v)), packing.segments, None)
        torch.testing.assert_close(kernel.float(), whole, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("is_told", [True, False], ids=["torch 2.13", "torch 2.11"])
def test_the_kernel_is_told_of_shared_heads_where_it_can_be(
    monkeypatch: pytest.MonkeyPatch, is_told: bool
) -> None:
    got: dict[str, Any] = {}

    def kernel(*arguments: Any, scale: Any, window_size: Any) -> None:
        assert len(arguments) == 7

    def newer_kernel(
        *arguments: Any, scale: Any, window_size: Any, enable_gqa: bool = False
    ) -> None:
        got["enable_gqa"] = enable_gqa

    monkeypatch.setattr(
        torch.nn.attention.varlen, "varlen_attn", newer_kernel if is_told else kernel
    )
    specification = importlib.util.find_spec("megatron_opd.mcore.attention")
    assert specification is not None and specification.loader is not None
    # as imported where torch has that kernel
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    query, key = (
        SimpleNamespace(shape=(8, heads, 64), is_cuda=True, dtype=torch.bfloat16)
        for heads in (4, 2)
    )
    module.causal_attention(query, key, key, Packing.of([8], 1, 0, HOST).segments, None)
    assert got == ({"enable_gqa": True} if is_told else {})


@given(st.integers(1, 50), st.integers(1, 4))
def test_ranks_share_out_every_token_with_equal_work(length: int, ranks: int) -> None:
    padded = LayoutConfig(context_parallel_size=ranks).padded_length(length)
    held = [local_positions(padded, ranks, rank) for rank in range(ranks)]
    assert length <= padded < length + 2 * ranks
    assert sorted(np.concatenate(held)) == list(range(padded))
    # a token's place is what it attends to
    assert len({positions.sum() for positions in held}) == 1


# ------------------------------------------------------------------------------------ who gets what
@settings(max_examples=200)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=60),
    st.integers(1, 4),
    st.integers(30, 90),
    st.integers(1, 3),
)
def test_micro_batches_are_within_the_limit_and_balanced(
    lengths: list[int], replicas: int, capacity: int, multiple: int
) -> None:
    bins = balanced(lengths, replicas, capacity, multiple)
    # ragged would be an error
    loads = np.array([[sum(lengths[i] for i in one) for one in mine] for mine in bins])
    assert sorted(i for mine in bins for one in mine for i in one) == list(range(len(lengths)))
    assert loads.max() <= capacity
    assert loads.shape[0] == replicas and loads.shape[1] % multiple == 0
    assert loads.max() - loads.min() <= max(lengths)
    # What all replicas wait for at the end of an update.
    assert np.ptp(loads.sum(axis=1)) <= max(lengths)


def test_ten_thousand_sequences_are_balanced_at_once() -> None:
    lengths = np.random.default_rng(0).integers(1, 1000, 10_000).tolist()
    bins = balanced([501] * 5000, 8, 1000)  # no two of them fit together
    assert all(len(one) <= 1 for mine in bins for one in mine)
    loads = [sum(lengths[i] for one in mine for i in one) for mine in balanced(lengths, 8, 4096)]
    assert max(loads) <= 1.001 * min(loads)


@contextmanager
def rank_of(layout: LayoutConfig, rank: int, world: int) -> Iterator[Parallel]:
    with world_of_one(rank, world):
        yield groups.create(layout)


def numbered_rows() -> list[Row]:
    """Token ids tell where they belong: 100 x the sequence + the place in it."""
    made = []
    for i, (prompt, completion) in enumerate([(3, 5), (1, 9), (7, 1), (2, 2), (4, 8)]):
        ids = (100 * i + np.arange(prompt + completion)).astype(np.int32)
        made.append(row(ids[prompt:], of=task(i, prompt_ids=ids[:prompt])))
    return made


def assert_consistent(batch: MicroBatch) -> None:
    """Every prediction is made at the token before, and positions are those within a sequence."""
    ids = np.concatenate([r.token_ids for r in numbered_rows()])
    tokens_S = batch.tokens_1S[0].numpy(force=True)
    positions_S = batch.packing.positions_S.numpy(force=True)
    predict_T = batch.predict_T.numpy(force=True)
    assert (tokens_S[predict_T] + 1 == ids[batch.index_T.numpy(force=True)]).all()
    real = (tokens_S > 0) | (positions_S == 0)
    assert (tokens_S[real] % 100 == positions_S[real]).all() or not len(ids)


@pytest.mark.parametrize(
    ("layout", "world", "tokens"),
    [
        (LayoutConfig(), 1, 12),
        (LayoutConfig(), 3, 50),
        (LayoutConfig(context_parallel_size=2), 4, 8),
        (LayoutConfig(2, 1, True, context_parallel_size=2), 4, 7),
        (LayoutConfig(4, 1, True), 4, 15),
        (LayoutConfig(1, 2, virtual_pipeline_model_parallel_size=2), 2, 14),
    ],
    ids=str,
)
def test_every_completion_token_is_predicted_once(
    layout: LayoutConfig, world: int, tokens: int
) -> None:
    seen, counts = [], set()
    for rank in range(world):
        with rank_of(layout, rank, world) as parallel:
            batches = micro_batches(numbered_rows(), parallel, tokens)
            counts.add(len(batches))
            for batch in batches:
                assert_consistent(batch)
                assert batch.tokens_1S.shape[1] <= tokens + 2 * layout.tensor_model_parallel_size
                if layout.sequence_parallel:
                    assert batch.tokens_1S.shape[1] % layout.tensor_model_parallel_size == 0
                if parallel.tp_rank == 0 and parallel.pp_rank == 0:
                    seen += batch.index_T.tolist()
    assert sorted(seen) == list(range(token_offsets(numbered_rows())[-1]))
    assert len(counts) == 1  # or pipelines and experts of other replicas would wait for ever
    assert counts.pop() % (2 if layout.virtual_pipeline_model_parallel_size > 1 else 1) == 0


def test_no_rollouts_make_no_micro_batch() -> None:
    with rank_of(LayoutConfig(), 0, 1) as parallel:
        assert micro_batches([], parallel, 8) == []
