"""Row 6 for one linear layer: the layer replayed with v, with its per-sample dot as epilogue.

d_i = sum_t <a_it v^T + bias, b_it>. The replayed output is consumed tile by tile, in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mts_fast.backends.triton.eligibility import accumulator
from mts_fast.backends.triton.kernels.product import product_options, product_tile, tile_of
from mts_fast.backends.triton.launch import launch

# row blocks that run one after another on the same outputs of v, which stay in the L2 cache
GROUP = 8
# of int32
LARGEST_OFFSET = 2**31 - 1
# the smallest BLOCK_K of a product
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
    """partial [cdiv(N, BLOCK_N), B T]: each row's part of d_i from BLOCK_N outputs.

        partial_jt = sum_{n in block j} (sum_k a_tk v_nk + bias_n) b_tn

    Grid [B cdiv(T, BLOCK_M) cdiv(N, BLOCK_N)]; a tile [BLOCK_M, BLOCK_N] of one sample a program,
    ordered so that GROUP row blocks share their outputs. Reads a, v and b once at best, and writes
    one accumulator for each row and BLOCK_N outputs.
    """
    # 1. the row block and output block of this program
    blocks_per_sample, blocks_n = tl.cdiv(positions, BLOCK_M), tl.cdiv(outputs, BLOCK_N)
    blocks_m = samples * blocks_per_sample
    pid = tl.program_id(0)
    first_m = pid // (GROUP * blocks_n) * GROUP
    group = tl.minimum(blocks_m - first_m, GROUP)
    pid_m = first_m + pid % (GROUP * blocks_n) % group
    pid_n = pid % (GROUP * blocks_n) // group
    sample = tl.cast(pid_m // blocks_per_sample, tl.int64)
    first_t = tl.cast(pid_m % blocks_per_sample, tl.int64) * BLOCK_M
    first_n = tl.cast(pid_n, tl.int64) * BLOCK_N
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    mask_m, mask_n = first_t + offs_m < positions, first_n + offs_n < outputs
    # 2. the replayed output, a tile of a v^T + bias
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
    # 3. its product with b, summed over the tile's outputs
    b_first = b_ptr + sample * stride_bb + first_t * stride_bt + first_n * stride_bn
    b_at = b_first + (offs_m[:, None] * stride_bt + offs_n[None, :] * stride_bn)
    b = tl.load(b_at, mask=mask_m[:, None] & mask_n[None, :], other=0.0)
    row = (tl.cast(pid_n, tl.int64) * samples + sample) * positions + first_t
    tl.store(partial_ptr + row + offs_m, tl.sum(acc * b.to(ACC), axis=1), mask=mask_m)


def hypergradient_dot(a: Tensor, v: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """d [B] of a [B, T, K], v [N, K], b [B, T, N], bias [N], in any strides.

    d is float32, and float64 for float64 b; operands of the product are cast to b's dtype.
    """
    shape, outputs = a.shape[:2], len(v)
    a, b = _as_few_samples(a, b)
    samples, positions, inputs = a.shape
    tile = tile_of(b.dtype)
    # operands that are cast in the kernel take twice the shared memory
    cast = max(a.dtype.itemsize, v.dtype.itemsize) > b.dtype.itemsize
    block_m = min(tile.rows, max(32, triton.next_power_of_2(positions)))
    blocks_n = triton.cdiv(outputs, tile.columns)
    acc_dtype = accumulator(b.dtype)
    partial = torch.empty((blocks_n, *shape), dtype=acc_dtype, device=a.device)
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


def offsets_fit_int32(a: Tensor, v: Tensor, b: Tensor) -> bool:
    """Whether the offsets within every tile fit int32; they do unless a tile spans 2^31 entries."""
    a, b = _as_few_samples(a, b)
    rows, columns = tile_of(b.dtype)[:2]
    spans = (
        rows * a.stride(1) + a.shape[2] * a.stride(2),
        columns * v.stride(0) + v.shape[1] * v.stride(1),
        rows * b.stride(1) + columns * b.stride(2),
    )
    return max(spans) <= LARGEST_OFFSET


def _as_few_samples(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Views of both as one long sample where their rows are equally spaced in memory: blocks of
    rows then need not end with a sample."""
    if not (_equally_spaced(a) and _equally_spaced(b)):
        return a, b
    one_sample_a, one_sample_b = (
        t.as_strided((1, t.shape[0] * t.shape[1], t.shape[2]), _one_sample_strides(t))
        for t in (a, b)
    )
    return one_sample_a, one_sample_b


def _equally_spaced(t: Tensor) -> bool:
    """Whether the B T rows of t [B, T, ...] are at equal distances in memory."""
    return 1 in t.shape[:2] or t.stride(0) == t.shape[1] * t.stride(1)


def _one_sample_strides(t: Tensor) -> tuple[int, int, int]:
    """Strides of the rows of t as those of one sample."""
    return 0, t.stride(1) if t.shape[1] > 1 else t.stride(0), t.stride(2)
