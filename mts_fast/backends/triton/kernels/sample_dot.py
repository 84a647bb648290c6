"""Products of two tensors summed over each sample, without writing the products."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mts_fast.backends.triton.eligibility import accumulator
from mts_fast.backends.triton.kernels.arithmetic import TRITON_DTYPE
from mts_fast.backends.triton.launch import launch

# entries per load, and loads per program
BLOCK = 2048
LOADS = 4


@triton.jit
def sample_dot_kernel(
    x_ptr,
    y_ptr,
    partial_ptr,
    size,
    chunks,
    BLOCK: tl.constexpr,
    LOADS: tl.constexpr,
    ACC: tl.constexpr,
):
    """partial [B, chunks]: sum of x y over a chunk, BLOCK LOADS entries of a sample.

    Grid [B chunks]; tiles [BLOCK], LOADS of them a program. Reads x and y once, and writes one
    accumulator a program.
    """
    # 1. the sample and chunk of this program
    pid = tl.program_id(0).to(tl.int64)
    sample = pid // chunks
    first = pid % chunks * (BLOCK * LOADS)
    # 2. sum products per lane
    total = tl.zeros([BLOCK], ACC)
    for i in tl.static_range(LOADS):
        offs = first + i * BLOCK + tl.arange(0, BLOCK)
        mask = offs < size
        x = tl.load(x_ptr + sample * size + offs, mask=mask, other=0.0)
        y = tl.load(y_ptr + sample * size + offs, mask=mask, other=0.0)
        total += x.to(ACC) * y.to(ACC)
    # 3. sum over the lanes; the sum over chunks is torch's
    tl.store(partial_ptr + pid, tl.sum(total, axis=0))


def sample_dot(x: Tensor, y: Tensor) -> Tensor:
    """<x_i, y_i> [B] of two tensors of one memory layout, without gaps, whose B samples follow one
    another; float32, and float64 for float64."""
    samples, size = len(x), x.shape[1:].numel()
    acc_dtype = accumulator(torch.promote_types(x.dtype, y.dtype))
    chunks = max(1, triton.cdiv(size, BLOCK * LOADS))
    partial = torch.empty((samples, chunks), dtype=acc_dtype, device=x.device)
    launch(
        sample_dot_kernel,
        (samples * chunks,),
        *(x, y, partial, size, chunks),
        BLOCK=BLOCK,
        LOADS=LOADS,
        ACC=TRITON_DTYPE[acc_dtype],
        num_warps=8,
    )
    return partial.sum(1)
