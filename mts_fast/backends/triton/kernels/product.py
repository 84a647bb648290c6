"""Tiles of matrix products, for kernels that consume a product without writing it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from mts_fast.backends.precision import allows_tf32
from mts_fast.backends.triton.eligibility import accumulator, interpreted
from mts_fast.backends.triton.kernels.arithmetic import TRITON_DTYPE


class ProductTile(NamedTuple):
    """Rows, columns and entries of the summed axis that a program takes at once, and its warps."""

    rows: int
    columns: int
    steps: int
    warps: int


# (tile of a kernel that holds one product, tile of one that holds two): large tiles that do not
# spill registers on sm_80 and sm_90 (triton 3.6 and 3.9)
TILES = {
    "float64": (ProductTile(32, 32, 16, 4), ProductTile(32, 32, 16, 4)),
    "float32": (ProductTile(32, 64, 16, 4), ProductTile(32, 64, 16, 4)),
    "tf32": (ProductTile(64, 64, 32, 4), ProductTile(64, 32, 32, 4)),
    "half": (ProductTile(128, 128, 64, 8), ProductTile(128, 64, 64, 8)),
}
STAGES = 3


@triton.jit
def product_tile(
    left_ptr, right_ptr, mask_m, mask_n, inputs,
    stride_lm, stride_lk, stride_rn, stride_rk,
    BLOCK_K, PRECISION, OPERAND, ACC,
):  # fmt: skip
    """left @ right^T [BLOCK_M, BLOCK_N]; left_ptr and right_ptr are at the tile's first rows.

    acc_mn = sum over tiles of k of sum_k left_mk right_nk

    Offsets within the tile are int32: with int64 offsets, or with rows computed by division, the
    pointers of a tile that is not contiguous spill registers.
    """
    offs_m, offs_n = tl.arange(0, mask_m.shape[0]), tl.arange(0, mask_n.shape[0])
    acc = tl.zeros([mask_m.shape[0], mask_n.shape[0]], ACC)
    for k in range(0, inputs, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < inputs
        # 1. load BLOCK_K entries of the summed axis, 0 outside
        left_at = left_ptr + (offs_m[:, None] * stride_lm + offs_k[None, :] * stride_lk)
        right_at = right_ptr + (offs_n[None, :] * stride_rn + offs_k[:, None] * stride_rk)
        left = tl.load(left_at, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        right = tl.load(right_at, mask=mask_n[None, :] & mask_k[:, None], other=0.0)
        left, right = left.to(OPERAND), right.to(OPERAND)
        # 2. add their products
        acc = tl.dot(left, right, acc, input_precision=PRECISION, out_dtype=ACC)
    return acc


def kind_of(dtype: torch.dtype) -> str:
    """The key in TILES of products of a dtype; TF32 only where torch's matmul may use it."""
    if dtype == torch.float32 and allows_tf32():
        return "tf32"
    return "half" if dtype.itemsize == 2 else str(dtype).removeprefix("torch.")


def tile_of(dtype: torch.dtype, *, products: int = 1) -> ProductTile:
    """The tile of a kernel that holds one or two products at a time."""
    return TILES[kind_of(dtype)][products - 1]


def product_options(dtype: torch.dtype) -> dict[str, Any]:
    """Constexprs and launch options of a kernel that makes products of that dtype."""
    kind = kind_of(dtype)
    # the interpreter's product of 16-bit floats is wrong: it multiplies float32 copies
    as_float32 = kind == "half" and interpreted()
    return {
        "PRECISION": "tf32" if kind == "tf32" else "ieee",
        "OPERAND": tl.float32 if as_float32 else TRITON_DTYPE[dtype],
        "ACC": TRITON_DTYPE[accumulator(dtype)],
        "num_stages": STAGES,
    }
