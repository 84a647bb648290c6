"""Whether tensors lie alike in memory, so that a kernel may walk through them entry by entry."""

from __future__ import annotations

import torch
from torch import Tensor


def lies_like(a: Tensor, b: Tensor) -> bool:
    """Whether both are of one shape and device, in the same order and without gaps."""
    if a.shape != b.shape or a.device != b.device:
        return False
    if a.is_contiguous() and b.is_contiguous():
        return True
    return a.stride() == b.stride() and torch.ops.aten.is_non_overlapping_and_dense(a)
