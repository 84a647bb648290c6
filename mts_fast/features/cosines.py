"""Exact cosines of samples to candidates that are named by their numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from mts_fast.features.pool_rows import PoolRows

# rows of which all entries are below, and the largest is above, have norms and products with unit
# rows that neither overflow nor vanish in float32
SAFE = (1e-15, 1e15)


class Cosines:
    """Cosines to the rows of a pool, by their lengths where these are moderate.

    Dividing a product by a length takes a third of the time of making every candidate a unit row.
    """

    def __init__(self, rows: PoolRows) -> None:
        self.rows = rows
        self._moderate = True
        scales = []
        for index in range(len(self.rows.starts)):
            part = self.rows.read(index)
            largest = part.abs().amax(1)
            inside = (largest == 0) | ((largest > SAFE[0]) & (largest < SAFE[1]))
            self._moderate &= bool(inside.all())
            norm = part.norm(dim=1)
            scales.append(torch.where(norm > 0, 1 / norm, norm))
        self._scale = torch.cat(scales)  # [N], 1 / length, or 0 of a zero row

    def of(self, unit: Tensor, numbers: Tensor) -> Tensor:
        """[n, M]: of unit rows [n, D] to samples `numbers` [n, M]."""
        if not self._moderate:
            rows = self.rows.unit_at(numbers.flatten()).view(*numbers.shape, -1)
            return torch.bmm(rows, unit[:, :, None])[:, :, 0]
        rows = self.rows.at(numbers.flatten()).view(*numbers.shape, -1)  # [n, M, D]
        return torch.bmm(rows, unit[:, :, None])[:, :, 0] * self._scale[numbers]
