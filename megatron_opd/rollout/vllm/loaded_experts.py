"""The weights of an engine's mixture-of-experts layer, under their Hugging Face names.

vLLM keeps the experts of a layer in two tensors, `w13_weight` [experts, gate rows; up rows, hidden]
and `w2_weight` [experts, hidden, intermediate], widens the intermediate size for its kernel, and on
the host permutes an expert's numbers into that kernel's tiles. The permutation is learned by
packing numbers that are their own places, and undone for the one expert that is read.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from vllm._custom_ops import cpu_prepack_moe_weight
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from megatron_opd.contracts.stations import Probes
from megatron_opd.weights.probes import project

PROJECTIONS = ("gate", "up", "down")


@dataclass(frozen=True)
class ExpertSlot:
    """One projection of one expert."""

    module: Any  # RoutedExperts
    expert: int
    projection: str  # one of PROJECTIONS
    shape: tuple[int, int]

    def project(self, probes: Probes) -> list[torch.Tensor]:
        """The products with the probes, float32 [K, O], of the one copy."""
        rows, columns = self.shape
        matrix_OI = self._matrix()[:, :columns]
        first = matrix_OI.shape[0] // 2 if self.projection == "up" else 0
        return [project(probes, matrix_OI[first : first + rows])]

    def _matrix(self) -> torch.Tensor:
        """This expert's [gate; up], or its down projection, in vLLM's widened form."""
        stored = self.module.w2_weight if self.projection == "down" else self.module.w13_weight
        kernel = self.module.quant_method.moe_kernel.fused_experts
        if not isinstance(kernel, CPUUnquantizedExperts) or kernel._use_zentorch:
            return stored[self.expert]
        rows, columns = stored.shape[1:]
        places = _places(rows, columns, stored.dtype, kernel.isa)
        plain = torch.empty(rows * columns, dtype=stored.dtype)
        plain[places] = stored[self.expert].flatten()
        return plain.view(rows, columns)


def expert_slots(path: str, module: RoutedExperts) -> Iterator[tuple[str, ExpertSlot]]:
    """Every tensor of the layer whose module is at `path`, by its Hugging Face name."""
    prefix = path.removesuffix(".routed_experts")
    hidden = module.hidden_size
    wide = module.moe_config.intermediate_size_per_partition_unpadded
    for expert in range(module.local_num_experts):
        for projection in PROJECTIONS:
            shape = (hidden, wide) if projection == "down" else (wide, hidden)
            yield (
                f"{prefix}.{expert}.{projection}_proj.weight",
                ExpertSlot(module, expert, projection, shape),
            )


def forget_packing(module: RoutedExperts) -> None:
    """Removes a layer's kernel on the host before a reload, so that its experts are packed again.

    vLLM 0.32.0 packs a layer only if it has no kernel yet. Without this a second load would leave
    the experts plain, and the kernel would read them as packed ones.
    """
    kernel = module.quant_method.moe_kernel
    if kernel is not None and isinstance(kernel.fused_experts, CPUUnquantizedExperts):
        module.quant_method.moe_kernel = None


@lru_cache(maxsize=8)
def _places(rows: int, columns: int, dtype: torch.dtype, isa: str) -> torch.Tensor:
    """int64 [rows * columns]: the place in the plain matrix of each number of the packed one."""
    plain = torch.arange(rows * columns)
    places = torch.zeros_like(plain)
    for shift in range(0, (rows * columns).bit_length(), 8):
        digit = (plain >> shift) & 0xFF  # bfloat16 carries integers up to 256 exactly
        packed = cpu_prepack_moe_weight(digit.to(dtype).view(1, rows, columns), isa)
        places += packed.flatten().long() << shift
    return places
