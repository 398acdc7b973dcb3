"""Vectors that sender and engine multiply a weight with, to learn that both have the same one.

Unit vectors read whole columns of the weight, exactly in any dtype, so that a tensor one update old
does not pass; a vector of signs covers the columns between them, up to rounding. Every version
reads other columns.
"""

import torch
from torch import Tensor

from megatron_opd.contracts.stations import Probes

_COLUMNS = 3


def make_probes(width: int, version: int, device: torch.device) -> Probes:
    """Probes for a width: columns spread over it, which move with the version, and signs."""
    if width == 1:
        return Probes((0,), torch.empty(0, device=device))
    bits = torch.randint(2, (width,), generator=torch.Generator().manual_seed(width))
    columns = tuple((i * width // _COLUMNS + version) % width for i in range(_COLUMNS))
    return Probes(columns, (2.0 * bits - 1).to(device))


def project(probes: Probes, matrix_OI: Tensor) -> Tensor:
    """The products of a matrix with the probes: float32 [exact + 1, O].

    They are computed in the matrix's dtype. A width of 1 has no row for the signs.
    """
    rows = [matrix_OI[:, list(probes.columns)].T]
    if len(probes.signs_I):
        rows.append((matrix_OI @ probes.signs_I.to(matrix_OI.dtype))[None])
    return torch.cat(rows).float()


def dense(probes: Probes, dtype: torch.dtype) -> Tensor:
    """The probes as a matrix [exact + 1, I], for a kernel that multiplies."""
    width = max(1, len(probes.signs_I))
    units = torch.zeros(len(probes.columns), width, dtype=dtype, device=probes.signs_I.device)
    units[range(len(probes.columns)), probes.columns] = 1
    return torch.cat([units, probes.signs_I.to(dtype)[None]]) if len(probes.signs_I) else units
