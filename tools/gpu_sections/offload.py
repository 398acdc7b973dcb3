"""Weights that wait in host memory: gone from the device, and the same when they come back."""

import time
from collections.abc import Iterator

import torch

from megatron_opd.mcore.offload import HostWeights
from tools.gpu_sections.machine import GIB, Machine
from tools.gpu_sections.rows import Row, below, exactly, measured, skipped


def check(machine: Machine) -> Iterator[Row]:
    size = machine.sized(2**18, 2**30)
    layers = [
        torch.nn.Linear(1024, size // 2**15, bias=False, dtype=torch.bfloat16) for _ in range(16)
    ]
    model = torch.nn.ModuleList(layers).to(machine.device).requires_grad_(False)
    before = [parameter.detach().cpu().clone() for parameter in model.parameters()]
    allocated = torch.cuda.memory_allocated() if machine.is_cuda else 0
    start = time.perf_counter()
    weights = HostWeights([model], machine.device)
    machine.synchronise()
    if machine.is_cuda:
        yield measured("seconds to pin a GiB", (time.perf_counter() - start) * GIB / size)
        kept = 1 - (allocated - torch.cuda.memory_allocated()) / size
        yield below("share of the bytes that stay on the device", kept, 0.01)
    else:
        yield skipped("bytes given back, seconds to pin", "needs a GPU")

    def trip() -> None:
        with weights.on_device():
            machine.synchronise()

    rate = size / machine.timed(trip).milliseconds / 1e6
    if machine.is_cuda:
        yield measured("onto the device, GB/s", rate)
    with weights.on_device():
        same = all(torch.equal(p.cpu(), b) for p, b in zip(model.parameters(), before, strict=True))
    yield exactly("weights equal after round trips", same, True)
