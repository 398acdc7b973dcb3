"""What a sender and an engine multiply a weight with, to tell whether both hold the same one.

Unit vectors read whole columns of the weight, exactly in any dtype, so that a tensor one update old
does not pass; a vector of signs covers the columns between them, up to rounding. Other columns are
read at every version.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_COLUMNS = 3


@dataclass(frozen=True)
class Probes:
    """Of a weight of some width, on its device."""

    columns: tuple[int, ...]
    signs_I: Tensor  # float32, 1 or -1; empty for a width of 1

    @classmethod
    def of(cls, width: int, version: int, device: torch.device) -> "Probes":
        """The columns are spread over the width and move with the version."""
        if width == 1:
            return cls((0,), torch.empty(0, device=device))
        bits = torch.randint(2, (width,), generator=torch.Generator().manual_seed(width))
        columns = tuple((i * width // _COLUMNS + version) % width for i in range(_COLUMNS))
        return cls(columns, (2.0 * bits - 1).to(device))

    @property
    def exact(self) -> int:
        """The first so many rows of the products have no rounding."""
        return len(self.columns)

    def project(self, matrix_OI: Tensor) -> Tensor:
        """float32 [exact + 1, O] (without the signs' row for a width of 1), computed in the
        matrix's dtype."""
        rows = [matrix_OI[:, list(self.columns)].T]
        if len(self.signs_I):
            rows.append((matrix_OI @ self.signs_I.to(matrix_OI.dtype))[None])
        return torch.cat(rows).float()

    def dense(self, dtype: torch.dtype) -> Tensor:
        """[exact + 1, I]: the same vectors for a kernel that multiplies."""
        width = max(1, len(self.signs_I))
        units = torch.zeros(len(self.columns), width, dtype=dtype, device=self.signs_I.device)
        units[range(len(self.columns)), self.columns] = 1
        return torch.cat([units, self.signs_I.to(dtype)[None]]) if len(self.signs_I) else units
