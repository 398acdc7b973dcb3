"""What a refit compares: equal weights held in another place must not look different, an old one
must."""

from collections.abc import Iterator

from megatron_opd.refit.push import _ROUNDING
from megatron_opd.weights.probes import make_probes, project
from tools.gpu_sections.machine import Machine
from tools.gpu_sections.rows import Row, below, exactly

SHAPES = ((152064, 3584), (18944, 3584), (3584, 18944), (4608, 3584), (512, 3584), (8192, 8192))


def check(machine: Machine) -> Iterator[Row]:
    """The sender's tensor, and the same numbers as rows of a merged one."""
    scale = machine.sized(16, 1)
    for dtype, limit in _ROUNDING.items():
        worst, missed = 0.0, 0
        for rows, width in SHAPES:
            merged = machine.normal(rows // scale + 64, width // scale, dtype=dtype, std=0.02)
            probes, sent = make_probes(merged.shape[1], 3, machine.device), merged[64:].clone()
            products, held = project(probes, sent), project(probes, merged[64:])
            worst = max(worst, float((products - held).abs().max() / products.abs().max()))
            older = project(probes, sent * 1.01)
            missed += bool((older[: probes.exact] == held[: probes.exact]).all())
        name = str(dtype).removeprefix("torch.")
        yield below(f"{name}: deviation of equal weights", worst, limit)
        yield exactly(f"{name}: other weights taken for equal", missed, 0)
