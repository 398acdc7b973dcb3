"""Experts that are stored together, as transformers 5 holds them, under the names of single ones.

A layer's `experts.gate_up_proj` is [expert, gate's rows and then up's, hidden size] and its
`experts.down_proj` [expert, hidden size, intermediate size]: every expert's tensor is one piece of
the file. Imports no torch.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from megatron_opd.weights.headers import Shape, TensorHeader

_FUSED = re.compile(r"(.+\.experts)\.(gate_up_proj|down_proj)")
_ITEM_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def single_experts(headers: Mapping[str, TensorHeader]) -> dict[str, TensorHeader]:
    """The tensors by name, with those of fused experts in their places.

    A fused tensor of another shape or dtype stays, for the caller to refuse by its name.
    """
    single: dict[str, TensorHeader] = {}
    for name, header in headers.items():
        match = _FUSED.fullmatch(name)
        is_stack = len(header.shape) == 3 and all(header.shape)
        if match and is_stack and header.dtype in _ITEM_SIZES:
            prefix, kind = match.groups()
            single |= _pieces(prefix, kind, header)
        else:
            single[name] = header
    return single


def _pieces(prefix: str, kind: str, header: TensorHeader) -> Iterator[tuple[str, TensorHeader]]:
    experts, rows, columns = header.shape
    parts: dict[str, Shape] = {"down_proj": (rows, columns)}
    if kind == "gate_up_proj":
        parts = {"gate_proj": (rows // 2, columns), "up_proj": (rows - rows // 2, columns)}
    offset = header.offset
    for expert in range(experts):
        for part, shape in parts.items():
            name = f"{prefix}.{expert}.{part}.weight"
            yield name, replace(header, shape=shape, offset=offset)
            offset += math.prod(shape) * _ITEM_SIZES[header.dtype]
