"""Rows of length 1, without overflow or underflow of their squares."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def unit_rows(rows: Tensor) -> Tensor:
    """rows [N, D] divided by their Euclidean norms; a zero row stays zero.

    The rows are scaled first, since squares of float32 numbers beyond 1e19 overflow, below 1e-23
    vanish.
    """
    largest = torch.linalg.vector_norm(rows.detach(), torch.inf, dim=1, keepdim=True)
    return F.normalize(rows / power_of_two(largest), dim=1)


def power_of_two(largest: Tensor) -> Tensor:
    """The power of two at or below each entry >= 0; 1 for 0. Division by it is exact."""
    values = largest.to(torch.promote_types(largest.dtype, torch.float32))
    # frexp: x = mantissa * 2^e with the mantissa in [1/2, 1); 2^e itself may be out of range
    power = values / (2 * torch.frexp(values).mantissa)
    return power.masked_fill(values == 0, 1.0).to(largest.dtype)
