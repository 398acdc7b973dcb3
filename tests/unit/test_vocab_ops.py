"""The rest of the vocabulary op on one rank: the fused output layer, divergences, truncated losses,
and the budgets."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opd.vocab_parallel import (
    blocks,
    divergence,
    linear_logprobs,
    linear_topk,
    logprobs,
    topk,
    truncated_forward_kl,
)
from tests.unit.live_bytes import LiveBytes
from tests.unit.test_vocab_parallel import dense


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want).norm() / want.norm().clamp(min=1e-30)).item()


# ------------------------------------------------------------------------------------------- logits
@pytest.mark.parametrize("k", [1, 2, 64, 65])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("reuse", [False, True])
def test_gradients_to_relative_precision(k, dtype, tolerance, reuse, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 300)  # three rows per block, the last one short
    torch.manual_seed(k)
    logits_TV = (torch.randn(7, 97) * 3).to(dtype).requires_grad_()
    reference_TV = logits_TV.detach().double().requires_grad_()
    ids_TK = torch.randint(-1, 90, (7, k))
    weights_TK, weights_T = torch.randn(7, k), torch.randn(7)
    arguments = {"temperature": 0.8, "valid_vocab_size": 90}
    out, entropy = logprobs(
        logits_TV, ids_TK, None, with_entropy=True, reuse_logits_for_grad=reuse, **arguments
    )
    want, want_entropy = dense(reference_TV, ids_TK, 0.8, 90)
    assert relative(out, want) < 1e-5
    assert relative(entropy, want_entropy) < 1e-5
    ((out * weights_TK).sum() + (entropy * weights_T).sum()).backward()
    ((want * weights_TK).sum() + (want_entropy * weights_T).sum()).backward()
    assert relative(logits_TV.grad, reference_TV.grad) < tolerance
    assert (logits_TV.grad[:, 90:] == 0).all()
    assert (logits_TV.grad.data_ptr() == logits_TV.data_ptr()) == reuse


def test_gradcheck_in_float64():
    torch.manual_seed(0)
    logits_TV = torch.randn(3, 11, dtype=torch.float64, requires_grad=True)
    ids_TK = torch.tensor([[1, 1], [10, -1], [4, 8]])
    torch.autograd.gradcheck(
        lambda z: logprobs(z, ids_TK, None, temperature=1.4, with_entropy=True), logits_TV
    )
    hidden_TD = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weight_VD = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(
        lambda h, w: linear_logprobs(h, w, ids_TK, None, with_entropy=True, slab_tokens=2),
        (hidden_TD, weight_VD),
    )
    teacher_TV = torch.randn(3, 11, dtype=torch.float64)
    for kind, parameters in KINDS:
        torch.autograd.gradcheck(
            lambda z, kind=kind, parameters=parameters: divergence(
                z, teacher_TV, None, kind=kind, **parameters
            ),
            logits_TV,
        )


def test_an_id_that_is_padding_has_probability_0():
    out = logprobs(torch.zeros(1, 6), torch.tensor([[5, 2]]), None, valid_vocab_size=4)
    assert out.tolist() == [[-torch.inf, pytest.approx(-1.3862944)]]


# --------------------------------------------------------------------------------- the output layer
@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(0, 9),
    vocab=st.integers(2, 60),
    slab=st.integers(1, 12),
    seed=st.integers(0, 1000),
)
def test_the_fused_output_layer_equals_logits_then_op(tokens, vocab, slab, seed):
    g = torch.Generator().manual_seed(seed)
    valid = max(1, vocab - 2)
    hidden = torch.randn(tokens, 6, generator=g)
    weight = torch.randn(vocab, 6, generator=g)
    ids_TK = torch.randint(-1, valid, (tokens, 3), generator=g)
    weights_TK = torch.randn(tokens, 3, generator=g)
    results = []
    for fused in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        arguments = {"temperature": 0.9, "valid_vocab_size": valid, "with_entropy": True}
        if fused:
            out, entropy = linear_logprobs(h, w, ids_TK, None, slab_tokens=slab, **arguments)
        else:
            out, entropy = logprobs(h @ w.T, ids_TK, None, **arguments)
        ((out * weights_TK).sum() + entropy.sum()).backward()
        results.append((out, entropy, h.grad, w.grad))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    k = min(4, valid)
    got = linear_topk(
        hidden, weight, k, None, ids_TJ=ids_TK, valid_vocab_size=valid, slab_tokens=slab
    )
    want = topk(hidden @ weight.T, k, None, ids_TJ=ids_TK, valid_vocab_size=valid)
    for name in got._fields:
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-5, atol=1e-5)


# -------------------------------------------------------------------------------------- divergences
KINDS = [
    ("forward_kl", {}),
    ("reverse_kl", {}),
    ("jsd", {"beta": 0.3}),
    ("skew_forward_kl", {"alpha": 0.1}),
    ("skew_reverse_kl", {"alpha": 0.1}),
    ("tvd", {}),
    ("alpha_beta", {"alpha": 0.4, "beta": 0.7}),
]


def dense_divergence(kind, p, q, alpha=None, beta=None):
    kl = lambda a, b: (a * (a.log() - b.log())).sum(1)  # noqa: E731
    return {
        "forward_kl": lambda: kl(q, p),
        "reverse_kl": lambda: kl(p, q),
        "jsd": lambda: (
            beta * kl(q, beta * q + (1 - beta) * p) + (1 - beta) * kl(p, beta * q + (1 - beta) * p)
        ),
        "skew_forward_kl": lambda: kl(q, alpha * q + (1 - alpha) * p),
        "skew_reverse_kl": lambda: kl(p, alpha * p + (1 - alpha) * q),
        "tvd": lambda: 0.5 * (p - q).abs().sum(1),
        "alpha_beta": lambda: (
            (
                alpha * q ** (alpha + beta)
                + beta * p ** (alpha + beta)
                - (alpha + beta) * q**alpha * p**beta
            ).sum(1)
            / (alpha * beta * (alpha + beta))
        ),
    }[kind]()


@pytest.mark.parametrize(("kind", "parameters"), KINDS)
def test_divergences_equal_the_dense_reference(kind, parameters):
    torch.manual_seed(3)
    student, teacher = torch.randn(5, 31) * 2, torch.randn(5, 31) * 2
    z = student.clone().requires_grad_()
    loss_T = divergence(
        z, teacher, None, kind=kind, temperature=1.5, valid_vocab_size=28, **parameters
    )
    reference = student.double().requires_grad_()
    p, q = ((each[:, :28].double() / 1.5).softmax(1) for each in (reference, teacher))
    want_T = dense_divergence(kind, p, q, **parameters)
    assert relative(loss_T, want_T) < 1e-5
    (loss_T * torch.arange(5)).sum().backward()
    (want_T * torch.arange(5)).sum().backward()
    assert relative(z.grad, reference.grad) < 1e-5


@pytest.mark.parametrize(("kind", "parameters"), KINDS)
def test_equal_distributions_do_not_diverge_and_zeros_are_safe(kind, parameters):
    z = torch.tensor([[1.0, -torch.inf, 0.5], [2.0, 1.0, -1e4]]).requires_grad_()
    loss_T = divergence(z, z.detach(), None, kind=kind, **parameters)
    loss_T.sum().backward()
    torch.testing.assert_close(loss_T, torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(z.grad, torch.zeros_like(z), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "kl"}, "kind='kl' is unknown; known: forward_kl"),
        ({"kind": "jsd"}, "takes beta, got"),
        ({"kind": "tvd", "alpha": 0.5}, "takes no parameters"),
        ({"kind": "jsd", "beta": 1.0}, "beta=1.0 must lie between 0 and 1"),
        ({"kind": "alpha_beta", "alpha": 0.5, "beta": -0.5}, "their sum not 0"),
    ],
)
def test_wrong_kinds_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        divergence(torch.zeros(1, 3), torch.zeros(1, 3), None, **arguments)


# --------------------------------------------------------------------------------- truncated losses
def test_truncated_losses_equal_their_formulas():
    torch.manual_seed(1)
    student = torch.randn(4, 20, dtype=torch.float64, requires_grad=True)
    lq_all = torch.randn(4, 20, dtype=torch.float64).log_softmax(1)
    lq, ids = lq_all.topk(5, dim=1)
    lp = student.log_softmax(1).gather(1, ids)
    q, mass_q, mass_p = lq.exp(), lq.exp().sum(1), lp.exp().sum(1)
    none = (q * (lq - lp)).sum(1)
    renormalised = q / mass_q[:, None]
    wanted = {
        "none": none,
        "renormalise": (renormalised * (renormalised.log() - lp)).sum(1),
        "ghost": none + (1 - mass_q) * ((1 - mass_q) / (1 - mass_p)).log(),
        "generalised": none - mass_q + mass_p,
    }
    gradients = {}
    for tail, want_T in wanted.items():
        got = truncated_forward_kl(lp, lq, tail=tail)
        torch.testing.assert_close(got.loss_T, want_T)
        torch.testing.assert_close(got.teacher_mass_T, mass_q)
        torch.testing.assert_close(got.student_mass_T, mass_p.detach())
        torch.autograd.gradcheck(
            lambda x, tail=tail: truncated_forward_kl(x, lq, tail=tail).loss_T, lp
        )
        (gradients[tail],) = torch.autograd.grad(got.loss_T.sum(), lp, retain_graph=True)
    torch.testing.assert_close(gradients["none"], gradients["renormalise"] * mass_q[:, None])
    with pytest.raises(ValueError, match="tail='x' is unknown"):
        truncated_forward_kl(lp, lq, tail="x")


# ------------------------------------------------------------------------------------------ budgets
def test_bytes_per_logit(monkeypatch):
    """bfloat16 logits, forward and backward, the logits themselves apart."""
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 2**15)
    tokens, vocab = 128, 8192
    ids_TK = torch.randint(0, vocab, (tokens, 66))
    peaks = {}
    for reuse in (False, True):
        logits_TV = torch.randn(tokens, vocab).bfloat16().requires_grad_()
        with LiveBytes() as live:
            live.ignore(logits_TV, ids_TK)
            out, entropy = logprobs(
                logits_TV, ids_TK, None, with_entropy=True, reuse_logits_for_grad=reuse
            )
            (out.sum() + entropy.sum()).backward()
        peaks[reuse] = live.peak / (tokens * vocab)
    assert 2.0 <= peaks[False] <= 2.5
    assert peaks[True] <= 0.6


def test_the_fused_output_layer_holds_an_eighth_of_the_logits(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 2**15)
    tokens, vocab, width = 256, 8192, 8
    hidden_TD = torch.randn(tokens, width).bfloat16().requires_grad_()
    weight_VD = torch.randn(vocab, width).bfloat16().requires_grad_()
    ids_TK = torch.randint(0, vocab, (tokens, 2))
    with LiveBytes() as live:
        live.ignore(hidden_TD, weight_VD, ids_TK)
        out, entropy = linear_logprobs(
            hidden_TD, weight_VD, ids_TK, None, with_entropy=True, slab_tokens=tokens // 8
        )
        (out.sum() + entropy.sum()).backward()
    # the weight's in float32 and as it is returned
    gradients = vocab * width * (4 + 2) + tokens * width * 2
    assert (live.peak - gradients) / (tokens * vocab) <= 1.0


# ---------------------------------------------------------------------------------------- bad input
IDS_TK = torch.zeros(2, 1).long()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: logprobs(torch.zeros(4, 6).T, torch.zeros(6, 1).long(), None),
         "logits_TV must be contiguous"),
        (lambda: logprobs(torch.zeros(2, 3).long(), IDS_TK, None),
         "logits_TV must be floating"),
        (lambda: logprobs(torch.zeros(2, 3), torch.zeros(2, 1), None), "ids_TK must be int64"),
        (lambda: linear_logprobs(torch.zeros(2, 3), torch.zeros(5, 4), IDS_TK, None),
         "the same D"),
        (lambda: linear_logprobs(torch.zeros(2, 3), torch.zeros(5, 3).half(), IDS_TK, None),
         "of one floating-point dtype"),
        (lambda: linear_topk(torch.zeros(2, 3), torch.zeros(5, 3), 6, None), "k=6"),
        (lambda: linear_topk(torch.zeros(2, 3), torch.zeros(5, 3), 1, None, slab_tokens=0),
         "slab_tokens=0"),
        (lambda: divergence(torch.zeros(2, 3), torch.zeros(2, 4), None, kind="tvd"),
         "must have one shape"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
