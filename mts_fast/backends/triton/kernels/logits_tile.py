"""Tiles of the logits hidden @ weight^T + bias, and the tensors and options of such a problem."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mts_fast.backends.triton.eligibility import accumulator
from mts_fast.backends.triton.kernels.product import product_options, product_tile, tile_of
from mts_fast.reference.target import Target

# programs that keep a large GPU busy: about four for each of 132 multiprocessors
ENOUGH_PROGRAMS = 512
MOST_SPLITS = 64


class RowLosses(NamedTuple):
    """Per row [M]: the loss, the largest logit, and the sum of exp(logit - maximum)."""

    losses: Tensor
    maximum: Tensor
    total: Tensor


class Problem(NamedTuple):
    """hidden [M, D] and weight [C, D] of one dtype, contiguous; a target with labels [M]."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None  # [C]
    target: Target

    @property
    def sizes(self) -> tuple[int, int, int]:
        """M, C, D."""
        return len(self.hidden), *self.weight.shape

    def tile(self, *, products: int = 1) -> dict[str, Any]:
        """Constexprs and launch options of a kernel that holds that many products at a time."""
        tile = tile_of(self.hidden.dtype, products=products)
        return product_options(self.hidden.dtype) | {
            "HAS_BIAS": self.bias is not None,
            "WEIGHTED": self.target.class_weight is not None,
            "SMOOTHING": self.target.label_smoothing,
            "BLOCK_M": tile.rows,
            "BLOCK_N": tile.columns,
            "BLOCK_K": tile.steps,
            "num_warps": tile.warps,
        }


@triton.jit
def logits_tile(
    hidden_ptr, weight_ptr, bias_ptr, first_m, first_n, mask_m, mask_n, width,
    HAS_BIAS, BLOCK_K, PRECISION, OPERAND, ACC,
):  # fmt: skip
    """Logits of the tile from row first_m and class first_n (int64) on; -inf outside mask_n."""
    x = product_tile(
        hidden_ptr + first_m * width, weight_ptr + first_n * width, mask_m, mask_n, width,
        width, 1, width, 1, BLOCK_K, PRECISION, OPERAND, ACC,
    )  # fmt: skip
    if HAS_BIAS:
        at = bias_ptr + first_n + tl.arange(0, mask_n.shape[0])
        x += tl.load(at, mask=mask_n, other=0.0).to(ACC)[None, :]
    return tl.where(mask_n[None, :], x, float("-inf"))


def splits_of(rows: int, classes: int, tile: dict[str, Any]) -> tuple[int, int]:
    """(number of splits of the classes, tiles per split); from the sizes alone, so that results do
    not depend on the GPU."""
    tiles = triton.cdiv(classes, tile["BLOCK_N"])
    row_blocks = max(1, triton.cdiv(rows, tile["BLOCK_M"]))
    wanted = min(tiles, MOST_SPLITS, triton.cdiv(ENOUGH_PROGRAMS, row_blocks))
    tiles_per_split = triton.cdiv(tiles, wanted)
    return triton.cdiv(tiles, tiles_per_split), tiles_per_split


def new_accumulator(problem: Problem, *shape: int) -> Tensor:
    """An uninitialised tensor of the problem's accumulator dtype."""
    acc_dtype = accumulator(problem.hidden.dtype)
    return torch.empty(shape, dtype=acc_dtype, device=problem.hidden.device)
