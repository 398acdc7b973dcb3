"""The vocabulary op against what else computes it, and against the bytes and the products that it
needs at least."""

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opd.vocab_parallel import divergence, linear_logprobs, linear_topk, logprobs
from megatron_opd.world import processes
from tools.gpu_sections.machine import Machine, has
from tools.gpu_sections.rows import Row, measured, skipped

Loss = Callable[[Tensor, Tensor], Tensor]  # (logits, ids) -> a number
TORCH_BYTES = 20  # per logit, of torch's log_softmax in float32 and its backward pass


def check(machine: Machine) -> Iterator[Row]:
    """Forward and backward together; the fewest bytes are two reads and a write of the logits."""
    processes.start()  # megatron-core's losses want a group
    tokens, vocab = machine.sized((16, 2000), (8192, 151936))
    for k in (1, 64):
        yield from _losses(machine, tokens, vocab, k)
        machine.tidy()
    yield from _output_layer(machine, tokens, vocab, machine.sized(64, 3584))
    yield from _teacher(machine, tokens, vocab, machine.sized(64, 3584))
    yield from _divergence(machine, *machine.sized((32, 1000), (2048, 151936)))


def _losses(machine: Machine, tokens: int, vocab: int, k: int) -> Iterator[Row]:
    source_TV = machine.normal(tokens, vocab, std=4)
    ids_TK = machine.ids(vocab, tokens, k)
    least = 3 * source_TV.nbytes
    if reason := machine.lacks((TORCH_BYTES + 4) * source_TV.numel()):
        yield skipped(f"K {k}, {tokens} x {vocab}", reason)
        return
    for name, loss in (
        OURS | (OTHERS if k == 1 else {"torch's log_softmax and gather": _dense})
    ).items():
        if name == LIGER and not (machine.is_cuda and has("liger_kernel")):
            yield skipped(f"K {k}, {name}", "needs a GPU and liger-kernel")
            continue
        if name == CORE_FUSED and not machine.is_cuda:
            yield skipped(f"K {k}, {name}", "needs a GPU")  # compiled by torch for many seconds
            continue

        def both(leaf_TV: Tensor, loss: Loss = loss) -> None:
            loss(leaf_TV, ids_TK).backward()

        timing = machine.timed(both, lambda: (source_TV.clone().requires_grad_(),))
        share = least / timing.milliseconds * 1e3 / machine.copy_rate
        beside = (
            f"{share:.0%} of a copy's speed, {timing.peak / source_TV.numel():.2f} bytes a logit"
        )
        yield measured(f"K {k}, {name}: ms", timing.milliseconds, machine.beside(beside))


def _output_layer(machine: Machine, tokens: int, vocab: int, width: int) -> Iterator[Row]:
    hidden_TD, weight_VD = (
        machine.normal(tokens, width),
        machine.normal(vocab, width, seed=1, std=0.02),
    )
    ids_TK = machine.ids(vocab, tokens, 1)

    def fused(hidden_TD: Tensor, weight_VD: Tensor) -> None:
        linear_logprobs(hidden_TD, weight_VD, ids_TK, None).sum().backward()  # type: ignore[union-attr]

    ways: dict[str, Callable[[Tensor, Tensor], None]] = {"output layer fused into the loss": fused}
    if machine.is_cuda and has("liger_kernel"):
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as liger

        ways[f"the same, {LIGER}"] = lambda h, w: liger(
            h, w, ids_TK[:, 0], reduction="sum"
        ).backward()
    else:
        yield skipped(f"output layer, {LIGER}", "needs a GPU and liger-kernel")
    make = lambda: (hidden_TD.clone().requires_grad_(), weight_VD.clone().requires_grad_())  # noqa: E731
    for name, run in ways.items():
        timing = machine.timed(run, make, repeat=3)
        # a product forward, again, and two backward
        rate = 8 * tokens * vocab * width / timing.milliseconds * 1e3
        share = f"{rate / machine.product_rate:.0%} of a product's rate"
        beside = f"{share}, peak {timing.peak / 2**30:.2f} GiB"
        yield measured(f"{name}, width {width}: ms", timing.milliseconds, machine.beside(beside))


def _teacher(machine: Machine, tokens: int, vocab: int, width: int) -> Iterator[Row]:
    hidden_TD, weight_VD = (
        machine.normal(tokens, width),
        machine.normal(vocab, width, seed=1, std=0.02),
    )
    ids_TJ = machine.ids(vocab, tokens, 1)
    bare = machine.timed(
        lambda: [rows @ weight_VD.T for rows in hidden_TD.split(1024)], repeat=3
    ).milliseconds
    for k in (1, 64):
        call = lambda k=k: linear_topk(hidden_TD, weight_VD, k, None, ids_TJ=ids_TJ)  # noqa: E731
        spent = machine.timed(call, repeat=3).milliseconds
        yield measured(
            f"the teacher's top {k}, width {width}: ms",
            spent,
            machine.beside(f"its products alone {bare:.3g}"),
        )


def _divergence(machine: Machine, tokens: int, vocab: int) -> Iterator[Row]:
    student_TV, teacher_TV = (machine.normal(tokens, vocab, seed=seed, std=4) for seed in (0, 1))
    run = lambda leaf: divergence(leaf, teacher_TV, None, kind="reverse_kl").sum().backward()  # noqa: E731
    timing = machine.timed(run, lambda: (student_TV.clone().requires_grad_(),), repeat=3)
    bytes_alone = (
        7 * student_TV.nbytes / machine.copy_rate * 1e3
    )  # both twice forward, once backward, and out
    beside = f"its bytes alone {bytes_alone:.3g}"
    yield measured(
        f"reverse KL over the whole vocabulary, {tokens} x {vocab}: ms",
        timing.milliseconds,
        machine.beside(beside),
    )


# ------------------------------------------------------------------------------------------- losses
def _ours(*, in_place: bool, entropy: bool) -> Loss:
    def loss(logits_TV: Tensor, ids_TK: Tensor) -> Tensor:
        out = logprobs(
            logits_TV, ids_TK, None, with_entropy=entropy, reuse_logits_for_grad=in_place
        )
        return out.sum() if isinstance(out, Tensor) else out[0].sum() + out[1].sum()

    return loss


def _dense(logits_TV: Tensor, ids_TK: Tensor) -> Tensor:
    return torch.log_softmax(logits_TV.float(), 1).gather(1, ids_TK).sum()


def _core(logits_TV: Tensor, ids_TK: Tensor) -> Tensor:
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

    return vocab_parallel_cross_entropy(logits_TV[:, None], ids_TK, tp_group=dist.group.WORLD).sum()


def _core_fused(logits_TV: Tensor, ids_TK: Tensor) -> Tensor:
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    return fused_vocab_parallel_cross_entropy(logits_TV[:, None], ids_TK, dist.group.WORLD).sum()


def _liger(logits_TV: Tensor, ids_TK: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_cross_entropy

    return liger_cross_entropy(logits_TV, ids_TK[:, 0], reduction="sum")


LIGER = "Liger"
CORE_FUSED = "megatron-core, fused"
OURS = {
    "ours": _ours(in_place=False, entropy=False),
    "ours, in place": _ours(in_place=True, entropy=False),
    "ours, in place, with entropy": _ours(in_place=True, entropy=True),
}
OTHERS: dict[str, Loss] = {
    "torch's log_softmax and gather": _dense,
    "megatron-core": _core,
    CORE_FUSED: _core_fused,
    LIGER: _liger,
}
