"""The vocabulary op on one rank, against dense float64 autograd. tests/distributed/ shards it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opd.vocab_parallel import logprobs, topk


def dense(logits_TV, ids_TK, temperature=1.0, valid=None):
    """Float64 reference of `logprobs(..., with_entropy=True)`."""
    z_TV = logits_TV.double() / temperature
    if valid is not None:
        z_TV = z_TV.masked_fill(torch.arange(z_TV.shape[1]) >= valid, -torch.inf)
    log_p_TV = z_TV.log_softmax(dim=1)
    picked_TK = log_p_TV.gather(1, ids_TK.clamp(min=0)).masked_fill(ids_TK < 0, 0.0)
    p_TV = log_p_TV.exp()
    entropy_T = -(p_TV * log_p_TV.masked_fill(p_TV == 0, 0.0)).sum(dim=1)
    return picked_TK, entropy_T


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 9),
    vocab=st.integers(2, 70),
    k=st.integers(1, 5),
    temperature=st.sampled_from([0.7, 1.0, 1.3]),
    padding=st.integers(0, 3),
    seed=st.integers(0, 10_000),
)
def test_values_and_gradients_equal_the_dense_reference(
    tokens, vocab, k, temperature, padding, seed
):
    g = torch.Generator().manual_seed(seed)
    valid = max(1, vocab - padding)
    ids_TK = torch.randint(-1, valid, (tokens, k), generator=g)
    logits_TV = (torch.randn(tokens, vocab, generator=g) * 4).requires_grad_()
    reference_TV = logits_TV.detach().double().requires_grad_()
    weights_TK, weights_T = torch.randn(tokens, k, generator=g), torch.randn(tokens, generator=g)

    out, entropy = logprobs(
        logits_TV, ids_TK, None, temperature=temperature, valid_vocab_size=valid, with_entropy=True
    )
    expected, expected_entropy = dense(reference_TV, ids_TK, temperature, valid)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=1e-5, atol=1e-5)

    ((out * weights_TK).sum() + (entropy * weights_T).sum()).backward()
    ((expected * weights_TK).sum() + (expected_entropy * weights_T).sum()).backward()
    torch.testing.assert_close(logits_TV.grad.double(), reference_TV.grad, rtol=1e-4, atol=2e-5)


def test_the_input_is_not_modified_and_huge_logits_are_safe():
    logits_TV = torch.tensor(
        [[1e4, -1e4, 0.0, -torch.inf], [-torch.inf, 3.0, -torch.inf, -torch.inf]]
    )
    before = logits_TV.clone()
    logits_TV.requires_grad_()
    out, entropy = logprobs(logits_TV, torch.tensor([[0, 1], [1, 1]]), None, with_entropy=True)
    assert torch.equal(out, torch.tensor([[0.0, -2e4], [0.0, 0.0]]))
    assert torch.equal(entropy, torch.zeros(2))
    (out.sum() + entropy.sum()).backward()
    assert torch.isfinite(logits_TV.grad).all()
    assert torch.equal(logits_TV.detach(), before)


def test_nan_is_not_silenced():
    logits_TV = torch.tensor([[0.0, float("nan"), 1.0]])
    assert logprobs(logits_TV, torch.tensor([[0]]), None).isnan().all()


def test_bfloat16_logits_give_float32_results_and_bfloat16_gradients():
    logits_TV = torch.randn(5, 33, dtype=torch.bfloat16).requires_grad_()
    ids_TK = torch.randint(0, 33, (5, 2))
    out = logprobs(logits_TV, ids_TK, None)
    out.sum().backward()
    assert (out.dtype, logits_TV.grad.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(
        out.double(), dense(logits_TV.detach(), ids_TK)[0], rtol=1e-5, atol=1e-5
    )


def test_topk_breaks_ties_by_the_lowest_id_and_masks_padding():
    logits_TV = torch.tensor([[1.0, 3.0, 3.0, 3.0, 9.0], [0.0, 0.0, 0.0, 0.0, 9.0]])
    best = topk(logits_TV, 2, None, ids_TJ=torch.tensor([[0], [3]]), valid_vocab_size=4)
    assert best.ids_TK.tolist() == [[1, 2], [0, 1]]
    expected, entropy = dense(
        logits_TV, torch.cat([best.ids_TK, torch.tensor([[0], [3]])], 1), valid=4
    )
    torch.testing.assert_close(torch.cat([best.logprobs_TK, best.logprobs_TJ], 1), expected.float())
    torch.testing.assert_close(best.entropy_T, entropy.float())
    assert topk(logits_TV, 1, None, valid_vocab_size=4).ids_TK.tolist() == [[1], [0]]
    assert topk(logits_TV, 0, None).ids_TK.shape == (2, 0)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([[7]]), "holds id 7, the global vocabulary has 5"),
        (torch.tensor([[0], [1]]), "T=1"),
        (torch.tensor([0]), r"\[T, K\]"),
    ],
)
def test_wrong_ids_are_named(ids, message):
    with pytest.raises(ValueError, match=message):
        logprobs(torch.zeros(1, 5), ids, None)


def test_k_beyond_the_vocabulary_is_named():
    with pytest.raises(ValueError, match="k=6"):
        topk(torch.zeros(1, 5), 6, None)
