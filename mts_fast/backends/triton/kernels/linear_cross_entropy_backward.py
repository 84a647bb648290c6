"""Gradients and tangents of the losses of hidden @ weight^T + bias; logits are recomputed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mts_fast.backends.triton.kernels.arithmetic import reciprocal
from mts_fast.backends.triton.kernels.logits_tile import (
    Problem,
    logits_tile,
    new_accumulator,
    splits_of,
)
from mts_fast.backends.triton.kernels.product import product_tile
from mts_fast.backends.triton.kernels.row_softmax import (
    class_weights,
    load_class_weight,
    load_labels,
    logit_gradient,
    shares,
)
from mts_fast.backends.triton.launch import launch

# entries of a slice of logit gradients: 128 MiB in 16 bits; its classes are a multiple
SLICE_ENTRIES = 2**26
SLICE_MULTIPLE = 128


@triton.jit
def slope_tile(
    x, offs_m, offs_n, mask_m, mask_n,
    labels_ptr, class_weight_ptr, weight_sum_ptr, maximum_ptr, total_ptr, classes, ignore_index,
    WEIGHTED, SMOOTHING, ACC,
):  # fmt: skip
    """d l_i/d logits of a tile of logits x: `logit_gradient` of softmax = exp(x - maximum) / total.

    0 where the label is ignored, NaN where it is outside [0, C).
    """
    label, counted, known = load_labels(labels_ptr, offs_m, mask_m, classes, ignore_index)
    label_share, smooth_share, mass = shares(
        label, known, class_weight_ptr, weight_sum_ptr, classes, WEIGHTED, SMOOTHING, ACC
    )
    base = tl.load(maximum_ptr + offs_m, mask=mask_m, other=0.0)
    s = tl.load(total_ptr + offs_m, mask=mask_m, other=1.0)
    slope = logit_gradient(
        tl.exp(x - base[:, None]) * reciprocal(s, ACC)[:, None],
        offs_n[None, :] == label[:, None],
        load_class_weight(class_weight_ptr, offs_n, mask_n, WEIGHTED, ACC)[None, :],
        label_share[:, None],
        smooth_share,
        mass[:, None],
    )
    slope = tl.where(known[:, None], slope, float("nan"))
    return tl.where(counted[:, None], slope, 0.0)


@triton.jit
def linear_cross_entropy_backward_kernel(
    hidden_ptr, weight_ptr, bias_ptr, labels_ptr, class_weight_ptr, weight_sum_ptr, maximum_ptr,
    total_ptr, cotangent_ptr, gradient_ptr,
    rows, classes, width, ignore_index, first_class, slice_classes,
    HAS_BIAS: tl.constexpr, WEIGHTED: tl.constexpr, SMOOTHING: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, OPERAND: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """cotangent_i * d l_i/d logits [M, slice] of the classes from first_class on.

    Grid [cdiv(M, BLOCK_M), cdiv(slice, BLOCK_N)]; a tile [BLOCK_M, BLOCK_N] a program. Requests
    hidden cdiv(slice, BLOCK_N) times and the slice of weight cdiv(M, BLOCK_M) times, which caches
    serve in part; writes M slice entries.
    """
    first_m = tl.program_id(0).to(tl.int64) * BLOCK_M
    offs_m = first_m + tl.arange(0, BLOCK_M)
    offs_s = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    first_n = first_class + tl.program_id(1).to(tl.int64) * BLOCK_N
    offs_n = first_n + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < rows, (offs_s < slice_classes) & (offs_n < classes)
    # 1. recompute the logits of the tile
    x = logits_tile(
        hidden_ptr, weight_ptr, bias_ptr, first_m, first_n, mask_m, mask_n, width,
        HAS_BIAS, BLOCK_K, PRECISION, OPERAND, ACC,
    )  # fmt: skip
    # 2. their gradient, times the cotangent of the row
    slope = slope_tile(
        x, offs_m, offs_n, mask_m, mask_n,
        labels_ptr, class_weight_ptr, weight_sum_ptr, maximum_ptr, total_ptr, classes, ignore_index,
        WEIGHTED, SMOOTHING, ACC,
    )  # fmt: skip
    slope *= tl.load(cotangent_ptr + offs_m, mask=mask_m, other=0.0).to(ACC)[:, None]
    # 3. store
    out = gradient_ptr + offs_m[:, None] * slice_classes + offs_s[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    tl.store(out, slope.to(gradient_ptr.dtype.element_ty), mask=mask)


@triton.jit
def linear_cross_entropy_tangent_kernel(
    hidden_ptr, weight_ptr, bias_ptr, labels_ptr, class_weight_ptr, weight_sum_ptr, maximum_ptr,
    total_ptr, weight_tangent_ptr, bias_tangent_ptr, partial_ptr,
    rows, classes, width, ignore_index, tiles_per_split,
    HAS_BIAS: tl.constexpr, WEIGHTED: tl.constexpr, SMOOTHING: tl.constexpr,
    MOVES_WEIGHT: tl.constexpr, MOVES_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, OPERAND: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """partial [splits, M]: sum over a split's classes of d l_i/d logit times the logit's tangent.

        t_ic = sum_k hidden_ik weight_tangent_ck + bias_tangent_c
        d l_i = sum_c (d l_i/dx_ic) t_ic

    Grid [cdiv(M, BLOCK_M), splits]; tiles [BLOCK_M, BLOCK_N], with two products each: the logits
    and their tangents. Requests hidden 2 cdiv(C, BLOCK_N) times, and weight and its tangent
    cdiv(M, BLOCK_M) times each, which caches serve in part; writes one accumulator for each row and
    split.
    """
    first_m = tl.program_id(0).to(tl.int64) * BLOCK_M
    offs_m = first_m + tl.arange(0, BLOCK_M)
    split = tl.program_id(1)
    mask_m = offs_m < rows
    total = tl.zeros([BLOCK_M], ACC)
    for tile in range(split * tiles_per_split, (split + 1) * tiles_per_split):
        first_n = tl.cast(tile, tl.int64) * BLOCK_N
        offs_n = first_n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < classes
        # 1. recompute the logits of a tile, and their gradient
        x = logits_tile(
            hidden_ptr, weight_ptr, bias_ptr, first_m, first_n, mask_m, mask_n, width,
            HAS_BIAS, BLOCK_K, PRECISION, OPERAND, ACC,
        )  # fmt: skip
        slope = slope_tile(
            x, offs_m, offs_n, mask_m, mask_n, labels_ptr, class_weight_ptr, weight_sum_ptr,
            maximum_ptr, total_ptr, classes, ignore_index, WEIGHTED, SMOOTHING, ACC,
        )  # fmt: skip
        slope = tl.where(mask_n[None, :], slope, 0.0)
        # 2. the tangents of its logits
        tangent = tl.zeros([BLOCK_M, BLOCK_N], ACC)
        if MOVES_WEIGHT:
            tangent = product_tile(
                hidden_ptr + first_m * width, weight_tangent_ptr + first_n * width, mask_m, mask_n,
                width, width, 1, width, 1, BLOCK_K, PRECISION, OPERAND, ACC,
            )  # fmt: skip
        if MOVES_BIAS:
            tangent += tl.load(bias_tangent_ptr + offs_n, mask=mask_n, other=0.0).to(ACC)
        # 3. add their product, summed over the tile's classes
        total += tl.sum(slope * tangent, axis=1)
    tl.store(partial_ptr + tl.cast(split, tl.int64) * rows + offs_m, total, mask=mask_m)


def linear_cross_entropy_backward(
    problem: Problem, maximum: Tensor, total: Tensor, cotangent: Tensor, needed: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias (empty where not needed) for row cotangents [M].

    One slice of logit gradients at a time, of as many classes as SLICE_ENTRIES allow. torch's
    matrix products of the slice give its weight gradients and its part of the hidden gradients.
    """
    rows, classes, width = problem.sizes
    tile = problem.tile()
    hidden, weight = problem.hidden, problem.weight
    per_slice = max(SLICE_ENTRIES // max(rows, 1) // SLICE_MULTIPLE, 1) * SLICE_MULTIPLE
    d_hidden = new_accumulator(problem, rows if needed[0] else 0, width).zero_()
    d_weight = weight.new_empty(classes if needed[1] else 0, width)
    d_bias = new_accumulator(problem, classes if needed[2] else 0)
    scales = class_weights(problem.target)
    labels = problem.target.labels.contiguous()
    for first in range(0, classes, per_slice):
        size = min(per_slice, classes - first)
        gradient = hidden.new_empty(rows, size)
        launch(
            linear_cross_entropy_backward_kernel,
            (triton.cdiv(rows, tile["BLOCK_M"]), triton.cdiv(size, tile["BLOCK_N"])),
            *(hidden, weight, problem.bias, labels, *scales, maximum, total),
            *(cotangent.contiguous(), gradient),
            *(rows, classes, width, problem.target.ignore_index, first, size),
            **tile,
        )
        class_slice = slice(first, first + size)
        if needed[0]:
            d_hidden += gradient @ weight[class_slice]
        if needed[1]:
            torch.mm(gradient.T, hidden, out=d_weight[class_slice])
        if needed[2]:
            torch.sum(gradient, 0, dtype=d_bias.dtype, out=d_bias[class_slice])
    return d_hidden.to(hidden.dtype), d_weight, d_bias


def linear_cross_entropy_tangent(
    problem: Problem,
    maximum: Tensor,
    total: Tensor,
    weight_tangent: Tensor | None,
    bias_tangent: Tensor | None,
) -> Tensor:
    """d l_i [M] along tangents of weight and bias."""
    rows, classes, width = problem.sizes
    tile = problem.tile(products=2)
    splits, tiles_per_split = splits_of(rows, classes, tile)
    partial = new_accumulator(problem, splits, rows)
    launch(
        linear_cross_entropy_tangent_kernel,
        (triton.cdiv(rows, tile["BLOCK_M"]), splits),
        *(problem.hidden, problem.weight, problem.bias, problem.target.labels.contiguous()),
        *class_weights(problem.target),
        *(maximum, total, weight_tangent, bias_tangent, partial),
        *(rows, classes, width, problem.target.ignore_index, tiles_per_split),
        MOVES_WEIGHT=weight_tangent is not None,
        MOVES_BIAS=bias_tangent is not None,
        **tile,
    )
    return partial.sum(0)
