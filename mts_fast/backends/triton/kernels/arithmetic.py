"""Triton's dtypes of torch's, and division rounded once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TRITON_DTYPE = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


@triton.jit
def divide(x, y, ACC: tl.constexpr):
    """x / y of one shape, rounded once: Triton's own float32 division may be two units in the last
    place off."""
    return tl.div_rn(x, y) if tl.float32 == ACC else x / y


@triton.jit
def reciprocal(y, ACC: tl.constexpr):
    """1 / y, rounded once."""
    return divide(tl.full(y.shape, 1.0, ACC), y, ACC)
