"""Whether a call is being differentiated in ways that only plain PyTorch follows."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def under_transform() -> bool:
    """Inside torch.func (vmap, grad, jvp) or forward-mode differentiation: an op with a backward of
    its own would silently have a tangent of 0 there."""
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or bool(torch._C._functorch.peek_interpreter_stack())
