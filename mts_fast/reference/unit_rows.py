"""Rows of length 1, whatever the size of their numbers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def unit_rows(rows: Tensor) -> Tensor:
    """rows [N, D] divided by their Euclidean norms; a zero row stays zero.

    The rows are scaled first, since squares of float32 numbers beyond 1e19 overflow, below 1e-23
    vanish.
    """
    return F.normalize(rows / power_of_two(rows.detach().abs().amax(1, keepdim=True)), dim=1)


def power_of_two(largest: Tensor) -> Tensor:
    """The power of two at or below each of some numbers >= 0; 1 for 0. Dividing by one is exact."""
    wide = largest.to(torch.promote_types(largest.dtype, torch.float32))
    # a number is its mantissa in [1/2, 1) times a power of two, which may be just out of range
    power = wide / (2 * torch.frexp(wide).mantissa)
    return power.masked_fill(wide == 0, 1.0).to(largest.dtype)
