"""Attention over packed sequences: FlashAttention's kernel for them, forward and backward, against
float32."""

from collections.abc import Iterator

import torch

from megatron_opd.mcore.attention import causal_attention
from megatron_opd.mcore.packing import Packing
from tools.gpu_sections.machine import Machine
from tools.gpu_sections.rows import Row, below, deviation

LIMITS = {torch.bfloat16: 2e-2, torch.float16: 4e-3}


def check(machine: Machine) -> Iterator[Row]:
    lengths, heads, shared, width = machine.sized(
        ([32, 8, 20], 4, 2, 32), ([1024, 8, 500, 2048, 1], 28, 4, 128)
    )
    segments = Packing.of(lengths, 1, 0, machine.device).segments
    assert segments is not None
    weights_D = torch.linspace(-1, 1, width, device=machine.device)
    for dtype, limit in LIMITS.items():
        inputs = [
            machine.normal(sum(lengths), h, width, dtype=dtype, seed=h)
            for h in (heads, shared, shared)
        ]
        results = []
        for precision in (dtype, torch.float32):
            leaves = [x.clone().to(precision).requires_grad_() for x in inputs]
            query, key, value = leaves
            out_THD = causal_attention(query, key, value, segments, None)
            (out_THD.float() * weights_D).sum().backward()
            results.append([out_THD, *(leaf.grad for leaf in leaves)])
        of = f"{str(dtype).removeprefix('torch.')}, {heads}/{shared} heads of {width}"
        for what, got, want in zip(("output", "grad q", "grad k", "grad v"), *results, strict=True):
            yield below(f"{of}: {what}", deviation(got, want), limit)
