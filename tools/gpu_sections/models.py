"""Whole models: log-probabilities, gradients and an optimizer step, against float32 on the host."""

from collections.abc import Iterator

import torch

from tools.gpu_sections import apart
from tools.gpu_sections.machine import Machine
from tools.gpu_sections.rows import Row, below, deviation, exactly, failed
from tools.gpu_sections.updates import Update, architectures, one_update

# Of log-probabilities, of gradients, and of Adam's first step: that is the gradient's sign, and
# where a gradient is all rounding, so is its sign.
LIMITS = {"float32": (2e-4, 1e-3, 0.1), "float16": (4e-3, 2e-2, 0.4), "bfloat16": (2e-2, 8e-2, 0.7)}
ROUTED = 4.0  # in 16 bits a router may choose other experts


def check(machine: Machine) -> Iterator[Row]:
    """The reference comes from a process that sees no CUDA."""
    read = lambda path: torch.load(path, weights_only=True)  # noqa: E731
    wanted = apart.ask("references", read, small=machine.small, hide_cuda=True)
    for name, arch in architectures(small=machine.small).items():
        for precision in LIMITS:
            try:
                got = one_update(arch, precision)
            except Exception as error:  # the others are still worth knowing
                yield failed(f"{name}, {precision}", error)
                continue
            loose = ROUTED if arch.experts and precision != "float32" else 1.0
            yield from _compare(f"{name}, {precision}", got, wanted[name], LIMITS[precision], loose)
            machine.tidy()


def _compare(
    name: str, got: Update, want: Update, limits: tuple[float, float, float], loose: float
) -> Iterator[Row]:
    values, gradients, step = limits
    gradients *= loose
    yield exactly(f"{name}: the update was applied", got["applied"], True)
    yield below(f"{name}: log-probabilities", deviation(got["logprobs"], want["logprobs"]), values)
    yield below(f"{name}: entropy", deviation(got["entropy"], want["entropy"]), values)
    yield below(f"{name}: gradient norm", abs(got["norm"] / want["norm"] - 1), gradients)
    names = sorted(want["gradients"])
    yield below(
        f"{name}: all gradients",
        deviation(*(_joined(x["gradients"], names) for x in (got, want))),
        gradients,
    )
    each = {
        n: deviation(got["gradients"][n], want["gradients"][n])
        for n in names
        if want["gradients"][n].norm() > 0
    }
    worst = max(each, key=lambda n: each[n])
    yield below(f"{name}: worst, {worst}", each[worst], 3 * gradients)
    yield below(
        f"{name}: the optimizer's step",
        deviation(*(_joined(x["changes"], names) for x in (got, want))),
        step,
    )


def _joined(tensors: dict[str, torch.Tensor], names: list[str]) -> torch.Tensor:
    return torch.cat([tensors[name].flatten() for name in names])
