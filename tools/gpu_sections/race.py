"""In place, the backward walk overwrites the targets' logits, which every thread must have read
before."""

from collections.abc import Iterator

from megatron_opd.vocab_parallel import logprobs
from tools.gpu_sections.machine import Machine
from tools.gpu_sections.rows import Row, exactly
from tools.gpu_sections.vocabulary import kernels_on


def check(machine: Machine) -> Iterator[Row]:
    """Against the gradient out of place, bit for bit, many times, with targets in the first block
    of the walk."""
    tokens, vocab, repeat = machine.sized((8, 9000, 1), (8192, 151936, 60))
    for k in (1, 2):  # a reduction over more ids would be a barrier
        wrong, runs = 0, 0
        while runs < repeat and machine.seconds_left > 30:
            logits_TV = machine.normal(tokens, vocab, seed=runs, std=4)
            ids_TK = machine.ids(min(4096, vocab), tokens, k, seed=runs)
            apart_TV, in_place_TV = logits_TV.clone().requires_grad_(), logits_TV.requires_grad_()
            with kernels_on(machine):
                logprobs(apart_TV, ids_TK, None).sum().backward()  # type: ignore[union-attr]
                logprobs(in_place_TV, ids_TK, None, reuse_logits_for_grad=True).sum().backward()  # type: ignore[union-attr]
            assert apart_TV.grad is not None and in_place_TV.grad is not None
            wrong += int(
                (apart_TV.grad.gather(1, ids_TK) != in_place_TV.grad.gather(1, ids_TK)).sum()
            )
            runs += 1
        yield exactly(
            f"K {k}: gradients that differ in place, of {runs * tokens * k} targets", wrong, 0
        )
