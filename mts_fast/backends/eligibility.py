"""What decides in every backend whether a kernel may serve: transforms and memory layout."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def under_transform() -> bool:
    """Inside torch.func (vmap, grad, jvp) or forward-mode differentiation: an op with a backward of
    its own would silently have a tangent of 0 there."""
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or bool(torch._C._functorch.peek_interpreter_stack())


def lies_like(a: Tensor, b: Tensor) -> bool:
    """Whether both are of one shape and device, in the same order and without gaps."""
    if a.shape != b.shape or a.device != b.device:
        return False
    if a.is_contiguous() and b.is_contiguous():
        return True
    return a.stride() == b.stride() and torch.ops.aten.is_non_overlapping_and_dense(a)
