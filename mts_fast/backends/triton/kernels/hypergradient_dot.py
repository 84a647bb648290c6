"""Row 6 for one linear layer: a replayed product with its per-sample dot as epilogue.

d_i = sum_t <a_it v^T + bias, b_it>. The replayed output is used up tile by tile, in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mts_fast.backends.triton.eligibility import accumulator
from mts_fast.backends.triton.launch import launch
from mts_fast.backends.triton.kernels.product import product_options, product_tile, tile_of

# row blocks that share their columns of v while these are in the L2 cache
GROUP = 8
LARGEST_OFFSET = 2**31 - 1
# the least that a product sums up at a time
SHORTEST_STEP = 16


@triton.jit
def hypergradient_dot_kernel(
    a_ptr,
    v_ptr,
    bias_ptr,
    b_ptr,
    partial_ptr,
    samples,
    positions,
    outputs,
    inputs,
    stride_ab,
    stride_at,
    stride_ak,
    stride_vn,
    stride_vk,
    stride_bb,
    stride_bt,
    stride_bn,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
):
    """partial [cdiv(N, BLOCK_N), B T]: each row's share from BLOCK_N outputs.

    Grid [B cdiv(T, BLOCK_M) cdiv(N, BLOCK_N)], in groups of row blocks, of one sample each. Moves
    a, v and b once at best, and 4 bytes for each row and BLOCK_N outputs.
    """
    per_sample, blocks_n = tl.cdiv(positions, BLOCK_M), tl.cdiv(outputs, BLOCK_N)
    blocks_m = samples * per_sample
    pid = tl.program_id(0)
    first_m = pid // (GROUP * blocks_n) * GROUP
    group = tl.minimum(blocks_m - first_m, GROUP)
    pid_m = first_m + pid % (GROUP * blocks_n) % group
    pid_n = pid % (GROUP * blocks_n) // group
    sample = tl.cast(pid_m // per_sample, tl.int64)
    first_t = tl.cast(pid_m % per_sample, tl.int64) * BLOCK_M
    first_n = tl.cast(pid_n, tl.int64) * BLOCK_N
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    mask_m, mask_n = first_t + offs_m < positions, first_n + offs_n < outputs
    acc = product_tile(
        a_ptr + sample * stride_ab + first_t * stride_at,
        v_ptr + first_n * stride_vn,
        mask_m,
        mask_n,
        inputs,
        stride_at,
        stride_ak,
        stride_vn,
        stride_vk,
        BLOCK_K,
        PRECISION,
        OPERAND,
        ACC,
    )
    if HAS_BIAS:
        acc += tl.load(bias_ptr + first_n + offs_n, mask=mask_n, other=0.0).to(ACC)[None, :]
    b_first = b_ptr + sample * stride_bb + first_t * stride_bt + first_n * stride_bn
    b_at = b_first + (offs_m[:, None] * stride_bt + offs_n[None, :] * stride_bn)
    b = tl.load(b_at, mask=mask_m[:, None] & mask_n[None, :], other=0.0)
    row = (tl.cast(pid_n, tl.int64) * samples + sample) * positions + first_t
    tl.store(partial_ptr + row + offs_m, tl.sum(acc * b.to(ACC), axis=1), mask=mask_m)


def hypergradient_dot(a: Tensor, v: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """d [B] of a [B, T, K], v [N, K], b [B, T, N], bias [N], in any strides.

    float32 (float64 of float64); the products in b's dtype.
    """
    shape, outputs = a.shape[:2], len(v)
    a, b = _as_few_samples(a, b)
    samples, positions, inputs = a.shape
    tile = tile_of(b.dtype)
    # operands that are cast on the way take twice the shared memory
    cast = max(a.dtype.itemsize, v.dtype.itemsize) > b.dtype.itemsize
    block_m = min(tile.rows, max(32, triton.next_power_of_2(positions)))
    blocks_n = triton.cdiv(outputs, tile.columns)
    wide = accumulator(b.dtype)
    partial = torch.empty((blocks_n, *shape), dtype=wide, device=a.device)
    launch(
        hypergradient_dot_kernel,
        (samples * triton.cdiv(positions, block_m) * blocks_n,),
        *(a, v, bias if bias is None else bias.contiguous(), b, partial),
        *(samples, positions, outputs, inputs, *a.stride(), *v.stride(), *b.stride()),
        **product_options(b.dtype),
        HAS_BIAS=bias is not None,
        BLOCK_M=block_m,
        BLOCK_N=tile.columns,
        BLOCK_K=max(tile.steps // 2, SHORTEST_STEP) if cast else tile.steps,
        GROUP=GROUP,
        num_warps=tile.warps,
    )
    return partial.sum((0, 2))


def reaches(a: Tensor, v: Tensor, b: Tensor) -> bool:
    """Whether the int32 offsets within a tile reach: they do unless the rows of one are 2^31
    entries apart."""
    a, b = _as_few_samples(a, b)
    rows, columns = tile_of(b.dtype)[:2]
    spans = (
        rows * a.stride(1) + a.shape[2] * a.stride(2),
        columns * v.stride(0) + v.shape[1] * v.stride(1),
        rows * b.stride(1) + columns * b.stride(2),
    )
    return max(spans) <= LARGEST_OFFSET


def _as_few_samples(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both as one long sample where their rows lie evenly: blocks of rows then need not end with
    a sample."""
    if not (_rows_are_even(a) and _rows_are_even(b)):
        return a, b
    one = [t.as_strided((1, t.shape[0] * t.shape[1], t.shape[2]), _even(t)) for t in (a, b)]
    return one[0], one[1]


def _rows_are_even(t: Tensor) -> bool:
    """Whether rows (b, t) lie at even distances."""
    return 1 in t.shape[:2] or t.stride(0) == t.shape[1] * t.stride(1)


def _even(t: Tensor) -> tuple[int, int, int]:
    """Strides of the same rows as one sample."""
    return 0, t.stride(1) if t.shape[1] > 1 else t.stride(0), t.stride(2)
