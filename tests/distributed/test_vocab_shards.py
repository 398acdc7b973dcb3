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
    from megatron_opd.mcore.vocab_parallel import logprobs, topk

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
    torch.testing.assert_close(shard_TV.grad, whole_TV.grad[:, rank * width : (rank + 1) * width], rtol=1e-5, atol=2e-6)
    want, got = topk(whole_TV, k, None, **arguments), topk(shard_TV, k, group, **arguments)
    assert torch.equal(want.ids_TK, got.ids_TK)
    torch.testing.assert_close(got.logprobs_TK, want.logprobs_TK, rtol=1e-6, atol=2e-6)


def main() -> int:
    dist.init_process_group("gloo")
    tp = dist.get_world_size()
    for vocab, valid in ((16, 16), (16, 15), (16, 3), (64, 41)):  # 3: whole shards are padding
        for temperature in (1.0, 0.7):
            for k in (1, 2, min(valid, 7)):
                check(dist.group.WORLD, vocab * tp // 2, min(valid, vocab * tp // 2), temperature, k)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
