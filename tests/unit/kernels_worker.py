"""The Triton kernels against the torch passes: interpreted on the CPU, or compiled on a GPU. See
test_vocab_kernels."""

import os

import pytest
import torch

from megatron_opd.vocab_parallel import blocks, kernels
from megatron_opd.vocab_parallel.shards import Shard

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", 32)
    with torch.device(DEVICE):
        yield


CASES = [  # T, width, valid, K, temperature, dtype
    (5, 70, 70, 1, 1.0, torch.float32),
    (3, 64, 41, 3, 0.7, torch.bfloat16),
    (4, 33, 33, 65, 1.3, torch.float32),
    (2, 32, 0, 2, 1.0, torch.float32),
    (3, 40, 7, 2, 1.0, torch.float16),
    (0, 16, 16, 2, 1.0, torch.float32),
]


@pytest.mark.parametrize("with_entropy", [True, False])
@pytest.mark.parametrize(("tokens", "width", "valid", "k", "temperature", "dtype"), CASES)
def test_kernels_equal_the_torch_passes(tokens, width, valid, k, temperature, dtype, with_entropy):
    torch.manual_seed(width + k)
    logits_TV = (torch.randn(tokens, width) * 5).to(dtype)
    if tokens > 1:
        logits_TV[0, 1] = -torch.inf
        logits_TV[1, :2] = 1e4
    shard = Shard(width, width, valid)  # the second of several ranks
    ids_TK = torch.randint(width - 3, 2 * width, (tokens, k))  # some on another shard, many twice
    columns_TK, here_TK = shard.columns(ids_TK)
    arguments = (columns_TK, here_TK, shard, temperature)
    got = kernels.statistics(logits_TV, *arguments, with_entropy=with_entropy)
    want = blocks.statistics(logits_TV, *arguments, with_entropy=with_entropy)
    for name in ("max_T", "sum_T", "dot_T", "at_TK"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-5, atol=1e-5)

    lse_T = want.max_T + want.sum_T.log() if valid else torch.zeros(tokens)
    entropy = (torch.rand(tokens), torch.randn(tokens)) if with_entropy else None
    grad_TK = torch.randn(tokens, k)
    arguments = (*arguments, lse_T, grad_TK, entropy)
    same_storage = logits_TV.clone()
    kernels.gradient(same_storage, same_storage, *arguments)
    # On the host, where torch divides by the temperature as IEEE 754 says; on CUDA it multiplies
    # with the inverse.
    logits_TV, columns_TK, here_TK, lse_T, grad_TK = (
        x.cpu() for x in (logits_TV, columns_TK, here_TK, lse_T, grad_TK)
    )
    entropy = entropy and (entropy[0].cpu(), entropy[1].cpu())
    wanted = torch.empty_like(logits_TV)
    blocks.gradient(
        logits_TV, wanted, columns_TK, here_TK, shard, temperature, lse_T, grad_TK, entropy
    )
    same_storage = same_storage.cpu()
    rounding = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(same_storage, wanted, rtol=rounding, atol=rounding)


def test_nan_is_not_silenced():
    shard = Shard(0, 40, 40)
    logits_TV = torch.zeros(2, 40)
    logits_TV[1, 3] = torch.nan
    columns_TK, here_TK = shard.columns(torch.zeros(2, 1, dtype=torch.long))
    sums = kernels.statistics(logits_TV, columns_TK, here_TK, shard, 1.0, with_entropy=True).sum_T
    assert sums.isnan().tolist() == [False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "width", "valid", "k"), [(2, 160, 150, 64), (1, 33, 33, 65), (1, 31, 0, 9)]
)
@pytest.mark.parametrize("kind", ["distinct", "many ties", "zeros of both signs", "masked"])
def test_the_best_columns_are_those_of_a_stable_sort(tokens, width, valid, k, dtype, kind):
    torch.manual_seed(width + k)
    logits_TV = (torch.randn(tokens, width) * 5).to(dtype)
    if kind == "many ties":
        logits_TV = logits_TV.round()
    if kind == "zeros of both signs":
        logits_TV = torch.where(torch.rand(tokens, width) < 0.5, -0.0, 0.0).to(dtype)
    if kind == "masked":
        logits_TV.masked_fill_(torch.rand(tokens, width) < 0.9, -torch.inf)
    values_TK, ids_TK = kernels.best(logits_TV, k, Shard(width, width, valid), 0.7)
    ordered = (logits_TV[:, :valid].float() / 0.7 + 0.0).sort(dim=1, descending=True, stable=True)
    torch.testing.assert_close(values_TK, ordered.values[:, :k], rtol=0, atol=0)
    assert torch.equal(ids_TK, ordered.indices[:, :k] + width)


def test_more_chunks_than_half_a_key_counts(monkeypatch):
    logits_TV = torch.randn(2, 70_000).bfloat16()
    monkeypatch.setattr(kernels, "SPAN", 1)
    monkeypatch.setattr(kernels, "BLOCK", 2**14)
    values_TK, ids_TK = kernels.best(logits_TV, 3, Shard(0, 70_000, 70_000), 1.0)  # keys of 64 bits
    ordered = logits_TV.float().sort(dim=1, descending=True, stable=True)
    assert torch.equal(values_TK, ordered.values[:, :3]) and torch.equal(
        ids_TK, ordered.indices[:, :3]
    )
