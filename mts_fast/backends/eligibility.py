"""Checks that every backend makes before a kernel runs: torch.func transforms, memory layout."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mts_fast._columns import devices_of


def under_transform() -> bool:
    """Whether this call is inside torch.func (vmap, grad, jvp) or forward-mode differentiation,
    where an op with a custom backward would silently have a tangent of 0."""
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or bool(torch._C._functorch.peek_interpreter_stack())


def several_devices(tensors: Sequence[Tensor]) -> list[str]:
    """The reason that tensors on more than one device are for every kernel, or none."""
    devices = devices_of(tensors)
    if len(devices) <= 1:
        return []
    return [f"its tensors are on several devices: {sorted(map(str, devices))}"]


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether both have one shape, device and order of entries in memory, without gaps."""
    if a.shape != b.shape or a.device != b.device:
        return False
    if a.is_contiguous() and b.is_contiguous():
        return True
    return a.stride() == b.stride() and torch.ops.aten.is_non_overlapping_and_dense(a)
