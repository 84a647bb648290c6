"""Tiles of logits hidden @ weight^T + bias by a matrix product, and what they are made of."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mts_fast._triton import interpreted
from mts_fast.kernels.row_softmax import TRITON_DTYPE

# rows x classes x D of a tile of float32 (multiplied without tensor cores) and of 16-bit floats
WIDE_TILE = (64, 64, 32)
HALF_TILE = (128, 128, 64)
# programs that keep a large GPU busy: about four for each of 132 multiprocessors
ENOUGH_PROGRAMS = 512
MOST_SPLITS = 64


class Softmax(NamedTuple):
    """Per row [M]: the loss, the largest logit, the sum of exp(logit - maximum); float32."""

    losses: Tensor
    maximum: Tensor
    total: Tensor


class Problem(NamedTuple):
    """hidden [M, D] and weight [C, D] of one dtype, contiguous; labels [M]."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None  # [C]
    labels: Tensor
    class_weight: Tensor | None  # [C]
    label_smoothing: float
    ignore_index: int

    @property
    def sizes(self) -> tuple[int, int, int]:
        """M, C, D."""
        return len(self.hidden), *self.weight.shape

    def tile(self) -> dict[str, Any]:
        """Constexprs and launch options of all kernels here."""
        half = self.hidden.dtype != torch.float32
        block_m, block_n, block_k = HALF_TILE if half else WIDE_TILE
        exact = torch.get_float32_matmul_precision() == "highest"
        return {
            "HAS_BIAS": self.bias is not None,
            "WEIGHTED": self.class_weight is not None,
            "SMOOTHING": self.label_smoothing,
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "BLOCK_K": block_k,
            "PRECISION": "ieee" if exact else "tf32",
            # the interpreter's product of 16-bit floats is wrong
            "OPERAND": tl.float32 if interpreted() else TRITON_DTYPE[self.hidden.dtype],
            "num_warps": 8 if half else 4,
            "num_stages": 3,
        }


@triton.jit
def product_tile(
    left_ptr, right_ptr, offs_m, offs_n, mask_m, mask_n, width, BLOCK_K, PRECISION, OPERAND
):
    """left [M, D] times right [C, D] transposed at rows offs_m and offs_n, in float32."""
    acc = tl.zeros([offs_m.shape[0], offs_n.shape[0]], tl.float32)
    for k in range(0, width, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < width
        left_at = left_ptr + offs_m[:, None] * width + offs_k[None, :]
        right_at = right_ptr + offs_n[None, :] * width + offs_k[:, None]
        left = tl.load(left_at, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        right = tl.load(right_at, mask=mask_n[None, :] & mask_k[:, None], other=0.0)
        acc = tl.dot(left.to(OPERAND), right.to(OPERAND), acc, input_precision=PRECISION)
    return acc


@triton.jit
def logits_tile(
    hidden_ptr, weight_ptr, bias_ptr, offs_m, offs_n, mask_m, mask_n, width,
    HAS_BIAS, BLOCK_K, PRECISION, OPERAND,
):  # fmt: skip
    """Logits of a tile; -inf where there is no class."""
    x = product_tile(
        hidden_ptr, weight_ptr, offs_m, offs_n, mask_m, mask_n, width, BLOCK_K, PRECISION, OPERAND
    )
    if HAS_BIAS:
        x += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    return tl.where(mask_n[None, :], x, float("-inf"))


def splits_of(rows: int, classes: int, tile: dict[str, Any]) -> tuple[int, int]:
    """Into how many parts the classes are cut, and tiles in each; by the sizes alone, so that
    results do not depend on the GPU."""
    tiles = triton.cdiv(classes, tile["BLOCK_N"])
    row_blocks = max(1, triton.cdiv(rows, tile["BLOCK_M"]))
    wanted = min(tiles, MOST_SPLITS, triton.cdiv(ENOUGH_PROGRAMS, row_blocks))
    tiles_per_split = triton.cdiv(tiles, wanted)
    return triton.cdiv(tiles, tiles_per_split), tiles_per_split


def new(problem: Problem, *shape: int) -> Tensor:
    """float32 of that shape, not written."""
    return torch.empty(shape, dtype=torch.float32, device=problem.hidden.device)
