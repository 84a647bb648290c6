"""Multiply a tensor by a scalar tensor in place, where the scalar is not 1."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mts_fast.backends.triton.launch import launch

# entries per program: 16 a thread with 8 warps
BLOCK = 4096


@triton.jit
def scale_kernel(values_ptr, factor_ptr, size, BLOCK: tl.constexpr):
    """values *= factor [], in place.

    Grid [cdiv(size, BLOCK)]; tile [BLOCK]. Reads and writes each value once; where the factor is 1,
    as in most backward passes, moves nothing but the factor.
    """
    # 1. load the factor
    factor = tl.load(factor_ptr)
    # 2. multiply, unless that changes nothing
    if factor != 1.0:
        offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(values_ptr + offs, mask=offs < size)
        tl.store(values_ptr + offs, (x * factor).to(x.dtype), mask=offs < size)


def scale_(values: Tensor, factor: Tensor) -> None:
    """Multiply contiguous values by a scalar tensor, in place."""
    grid = (triton.cdiv(values.numel(), BLOCK),)
    launch(scale_kernel, grid, values, factor, values.numel(), BLOCK=BLOCK, num_warps=8)
