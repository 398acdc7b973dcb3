"""The vocabulary op over 2 and 4 shards: values, gradients, top-k and the number of collectives."""

import sys

import pytest
import torch
import torch.distributed as dist

if __name__ != "__main__":

    @pytest.mark.parametrize("nproc", [2, 4])
    def test_shards_agree_with_one_rank(run_distributed, nproc):
        run_distributed(__file__, nproc)


def count_collectives(call):
    """How often `call` uses `all_reduce` or a gather."""
    count = 0
    originals = {name: getattr(dist, name) for name in ("all_reduce", "all_gather")}

    def counted(original):
        def wrapper(*args, **kwargs):
            nonlocal count
            count += 1
            return original(*args, **kwargs)

        return wrapper

    for name, original in originals.items():
        setattr(dist, name, counted(original))
    try:
        return call(), count
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def check(group, vocab, valid, temperature, k):
    from megatron_opd.vocab_parallel import logprobs, topk

    torch.manual_seed(vocab)
    tp, rank = group.size(), group.rank()
    width = vocab // tp
    full_TV = torch.randn(11, vocab).mul(3).round(decimals=1)  # rounded: ties between shards
    ids_TK = torch.randint(-1, valid, (11, 3))
    arguments = {"temperature": temperature, "valid_vocab_size": valid}
    whole_TV = full_TV.clone().requires_grad_()
    shard_TV = full_TV[:, rank * width : (rank + 1) * width].clone().requires_grad_()
    expected, expected_entropy = logprobs(whole_TV, ids_TK, None, with_entropy=True, **arguments)
    (out, entropy), forward = count_collectives(
        lambda: logprobs(shard_TV, ids_TK, group, with_entropy=True, **arguments)
    )
    _, backward = count_collectives(lambda: (out.sum() + 2 * entropy.sum()).backward())
    (expected.sum() + 2 * expected_entropy.sum()).backward()
    assert (forward, backward) == (2, 0)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(entropy, expected_entropy, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(
        shard_TV.grad, whole_TV.grad[:, rank * width : (rank + 1) * width], rtol=1e-5, atol=2e-6
    )
    got, collectives = count_collectives(lambda: topk(shard_TV, k, group, **arguments))
    want = topk(whole_TV, k, None, **arguments)
    assert collectives == 1
    assert torch.equal(want.ids_TK, got.ids_TK)
    torch.testing.assert_close(got.logprobs_TK, want.logprobs_TK, rtol=1e-6, atol=2e-6)


def check_output_layer_and_divergence(group, vocab, valid, dtype, tolerance):
    """The fused output layer and a divergence over shards, against one rank."""
    from megatron_opd.contracts.merged_ids import MergedIds
    from megatron_opd.vocab_parallel import divergence, linear_logprobs, linear_topk, logprobs

    torch.manual_seed(vocab)
    tp, rank = group.size(), group.rank()
    mine = slice(rank * vocab // tp, (rank + 1) * vocab // tp)
    ids_TK = torch.randint(-1, valid, (11, 65))
    hidden, weight = torch.randn(11, 8).to(dtype), torch.randn(vocab, 8).to(dtype)
    arguments = {"temperature": 1.3, "valid_vocab_size": valid}
    h, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    want, want_entropy = logprobs(h @ w.T, ids_TK, None, with_entropy=True, **arguments)
    (want.sum() + 2 * want_entropy.sum()).backward()
    for reduce in (True, False):
        h_here, w_here = hidden.clone().requires_grad_(), weight[mine].clone().requires_grad_()
        (out, entropy), forward = count_collectives(
            lambda h=h_here, w=w_here, reduce=reduce: linear_logprobs(
                h,
                w,
                ids_TK,
                group,
                with_entropy=True,
                slab_tokens=3,
                reduce_hidden_grad=reduce,
                **arguments,
            )
        )
        _, backward = count_collectives(
            lambda out=out, entropy=entropy: (out.sum() + 2 * entropy.sum()).backward()
        )
        assert (forward, backward) == (2, int(reduce))
        if not reduce:
            dist.all_reduce(h_here.grad, group=group)
        for got, expected in (
            (out, want),
            (entropy, want_entropy),
            (h_here.grad, h.grad),
            (w_here.grad, w.grad[mine]),
        ):
            error = (got.double() - expected).norm() / expected.norm().clamp(min=1e-12)
            assert error < tolerance or expected.norm() < 1e-9, (tp, vocab, valid, dtype, error)
    best, count = count_collectives(
        lambda: linear_topk(hidden, weight[mine], 3, group, slab_tokens=4, **arguments)
    )
    whole = linear_topk(hidden, weight, 3, None, **arguments)
    assert count == 1
    assert torch.equal(best.ids_TK, whole.ids_TK)
    # An id of the last shard and one of the first become one of the second; the teacher's rows may
    # be padding to us.
    merged = MergedIds((1, vocab - 1), vocab // 2 if vocab // 2 < valid else 2)

    def moved(rows, over):
        return linear_topk(hidden, rows, 3, over, ids_TJ=ids_TK, merged=merged, **arguments)

    best, count = count_collectives(lambda: moved(weight[mine], group))
    assert count == 2
    for got, expected in zip(best, moved(weight, None), strict=True):
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)

    student, teacher = torch.randn(11, vocab), torch.randn(11, vocab)
    whole_TV, shard_TV = student.clone().requires_grad_(), student[:, mine].clone().requires_grad_()
    kind = {"kind": "jsd", "beta": 0.4, **arguments}
    expected = divergence(whole_TV, teacher, None, **kind)
    got, count = count_collectives(
        lambda: divergence(shard_TV, teacher[:, mine].contiguous(), group, **kind)
    )
    assert count == 3
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    expected.sum().backward()
    _, count = count_collectives(lambda: got.sum().backward())
    assert count == 0
    torch.testing.assert_close(shard_TV.grad, whole_TV.grad[:, mine], rtol=1e-4, atol=1e-6)


def check_heads(group, vocab):
    """A divergence of a sharded student from a teacher with ends of its own: sharded too, or whole
    and of more rows."""
    from megatron_opd.contracts.merged_ids import MergedIds
    from megatron_opd.mcore.head import Head

    torch.manual_seed(vocab)
    tp, rank = group.size(), group.rank()
    alone = [dist.new_group([each]) for each in range(tp)][rank]
    mine = slice(rank * vocab // tp, (rank + 1) * vocab // tp)
    student_VD, teacher_VD = torch.randn(vocab, 8), torch.randn(vocab + 4, 8)
    hidden_TD, teacher_TD = torch.randn(2, 11, 8).unbind()
    merged = MergedIds((1, vocab - 1), vocab // 2)
    settings = {
        "kind": "reverse_kl",
        "alpha": None,
        "beta": None,
        "temperature": 1.3,
        "valid_vocab_size": vocab,
    }

    def gradient(weight_VD, over, teacher):
        leaf_TD = hidden_TD.clone().requires_grad_()
        student = Head(leaf_TD, weight_VD, over, sums_hidden_grad=True, fused=False)
        loss_T = student.divergence(teacher, **settings)
        (grad_TD,) = torch.autograd.grad(loss_T.sum(), leaf_TD)
        if over is group:
            dist.all_reduce(grad_TD, group=group)
        return loss_T, grad_TD

    def frozen(weight_VD, over):
        return Head(teacher_TD, weight_VD, over, sums_hidden_grad=True, fused=False, merged=merged)

    for rows in (vocab, vocab + 4):
        expected = gradient(student_VD, alone, frozen(teacher_VD[:rows], alone))
        teachers = [frozen(teacher_VD[:rows], alone)]
        teachers += [frozen(teacher_VD[mine], group)] if rows == vocab else []
        for teacher in teachers:
            for got, want in zip(gradient(student_VD[mine], group, teacher), expected, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def main() -> int:
    dist.init_process_group("gloo")
    tp = dist.get_world_size()
    for vocab, valid in ((16, 16), (16, 15), (16, 3), (64, 41)):  # 3: whole shards are padding
        for temperature in (1.0, 0.7):
            for k in (1, 2, min(valid, 7)):
                check(
                    dist.group.WORLD, vocab * tp // 2, min(valid, vocab * tp // 2), temperature, k
                )
    for vocab, valid in ((16, 16), (16, 5), (52, 41)):
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
            check_output_layer_and_divergence(
                dist.group.WORLD, vocab * tp // 2, valid, dtype, tolerance
            )
    check_heads(dist.group.WORLD, 8 * tp)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
