"""Cross-entropy of rows of logits: losses, statistics and gradients from one read of the logits."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mts_fast.backends.triton.eligibility import accumulator
from mts_fast.backends.triton.launch import launch
from mts_fast.backends.triton.kernels.arithmetic import TRITON_DTYPE, reciprocal
from mts_fast.backends.triton.kernels.row_softmax import (
    online_softmax_update,
    class_weights,
    finite_maximum,
    load_class_weight,
    load_labels,
    logit_gradient,
    row_offsets,
    shares,
)
from mts_fast.reference.target import Target

# rows of up to so many bytes (in the accumulator's dtype) stay in registers: 16 warps with 16
# float32 a thread; with twice as much they spill (triton 3.6 and 3.9). Wider ones are read in
# tiles, and once more for the gradient, which the L2 cache serves in part.
WHOLE_BYTES = 32_768
# bytes and warps of such a tile; with statistics or smoothing more is kept of each entry. None
# of these spills, as others next to them do.
LOOP = {torch.float32: (16_384, 8), torch.float64: (16_384, 8)}
LOOP_WITH_SUMS = {torch.float32: (8192, 16), torch.float64: (4096, 8)}
# a tile of several short rows, and the widest of the backward
SMALL_BYTES = 2048
GRADIENT_BYTES = 4096
BYTES_PER_WARP = 2048


class RowCrossEntropy(NamedTuple):
    """What one pass gives of M rows; what was not asked for has no entries."""

    losses: Tensor  # [M], float32 (float64 of float64)
    maximum: Tensor  # [M], largest logit
    total: Tensor  # [M], sum of exp(logit - maximum)
    statistics: Tensor  # [3, M]: error norm, correct, entropy
    gradient: Tensor  # [M, C], cotangent times d losses/d logits, in the logits' dtype


class Tile(NamedTuple):
    """How many rows and columns a program takes at a time."""

    rows: int
    columns: int
    whole: bool  # all columns at once
    warps: int


def tile_of(classes: int, wide: torch.dtype, *, sums: bool) -> Tile:
    """The tile for rows of that width; `sums` with statistics or smoothing."""
    columns = triton.next_power_of_2(classes)
    if columns * wide.itemsize > WHOLE_BYTES:
        size, warps = (LOOP_WITH_SUMS if sums else LOOP)[wide]
        return Tile(1, size // wide.itemsize, False, warps)
    return _tile_of_columns(columns, wide)


def gradient_tile_of(classes: int, wide: torch.dtype) -> Tile:
    """The tile of the backward, which may cut rows as it likes."""
    columns = min(triton.next_power_of_2(classes), GRADIENT_BYTES // wide.itemsize)
    return _tile_of_columns(columns, wide)


def _tile_of_columns(columns: int, wide: torch.dtype) -> Tile:
    size = columns * wide.itemsize
    rows = max(1, SMALL_BYTES // size)
    return Tile(rows, columns, True, max(4, rows * size // BYTES_PER_WARP))


@triton.jit
def cross_entropy_kernel(
    logits_ptr,
    labels_ptr,
    class_weight_ptr,
    weight_sum_ptr,
    cotangent_ptr,
    losses_ptr,
    maximum_ptr,
    total_ptr,
    statistics_ptr,
    gradient_ptr,
    rows,
    classes,
    positions,
    stride_xb,
    stride_xt,
    stride_xc,
    ignore_index,
    WEIGHTED: tl.constexpr,
    SMOOTHING: tl.constexpr,
    STATISTICS: tl.constexpr,
    GRADIENT: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGNED: tl.constexpr,
    ACC: tl.constexpr,
):
    """Losses (and statistics, and cotangent times slope) of BLOCK_M rows.

    Grid [cdiv(M, BLOCK_M)]; tiles [BLOCK_M, BLOCK_C]. Moves each logit once (WHOLE; else once more
    for the gradient) and the gradient once.
    """
    classes *= ALIGNED
    # widened first: a stride may fit into int32 only while it is divided
    stride_xb = tl.cast(stride_xb, tl.int64) * ALIGNED
    stride_xt = tl.cast(stride_xt, tl.int64) * ALIGNED
    pid = tl.program_id(0).to(tl.int64)
    offs_m = pid * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < rows
    label, counted, known = load_labels(labels_ptr, offs_m, mask_m, classes, ignore_index)
    start = row_offsets(offs_m, positions, stride_xb, stride_xt)
    at_label = logits_ptr + start + label.to(tl.int64) * stride_xc
    x_label = tl.load(at_label, mask=known, other=0.0).to(ACC)
    label_share, smooth_share, mass = shares(
        label, known, class_weight_ptr, weight_sum_ptr, classes, WEIGHTED, SMOOTHING, ACC
    )

    m = tl.full([BLOCK_M], float("-inf"), ACC)
    s = tl.zeros([BLOCK_M], ACC)
    others = tl.zeros([BLOCK_M], ACC)  # of all classes but the label: sum e
    squares = tl.zeros([BLOCK_M], ACC)  # and sum e^2
    weighted_e = tl.zeros([BLOCK_M], ACC)  # sum e (x - m)
    beaten = tl.zeros([BLOCK_M], tl.int32)  # by classes that an argmax would take first
    weights_seen = tl.zeros([BLOCK_M], ACC)
    differences = tl.zeros([BLOCK_M], ACC)  # sum of class weight times (x - m)
    e = tl.zeros([BLOCK_M, BLOCK_C], ACC)
    # one turn that the compiler can see to be one
    end = BLOCK_C if WHOLE else classes
    for first in range(0, end, BLOCK_C):
        offs_c = first + tl.arange(0, BLOCK_C)
        mask_c = offs_c < classes
        mask = mask_m[:, None] & mask_c[None, :]
        at = start[:, None] + offs_c[None, :].to(tl.int64) * stride_xc
        x = tl.load(logits_ptr + at, mask=mask, other=float("-inf")).to(ACC)
        s_before = s
        m, s, shifted, e, decay, drop = online_softmax_update(x, m, s)
        if STATISTICS:
            is_label = offs_c[None, :] == label[:, None]
            e_other = tl.where(is_label, 0.0, e)
            others = others * decay + tl.sum(e_other, axis=1)
            squares = squares * decay * decay + tl.sum(e_other * e_other, axis=1)
            # 0 * -inf would be NaN
            terms = tl.where(e > 0, e * shifted, tl.where(e == 0, 0.0, e))
            weighted_e = decay * (weighted_e + s_before * drop) + tl.sum(terms, axis=1)
            ahead = (x > x_label[:, None]) | (
                (x == x_label[:, None]) & (offs_c[None, :] < label[:, None])
            )
            beaten += tl.sum((ahead & mask).to(tl.int32), axis=1)
        if SMOOTHING > 0:
            weight = load_class_weight(class_weight_ptr, offs_c, mask_c, WEIGHTED, ACC)
            terms = tl.where(mask, weight[None, :] * shifted, 0.0)
            differences += weights_seen * drop + tl.sum(terms, axis=1)
            weights_seen += tl.sum(weight, axis=0)

    log_s, inverse = tl.log(s), reciprocal(s, ACC)
    base = finite_maximum(m)
    loss = label_share * ((base - x_label) + log_s)
    if SMOOTHING > 0:
        loss += smooth_share * (weights_seen * log_s - differences)
    # a label outside [0, C) has no loss: NaN, not somebody else's number
    loss = tl.where(counted, tl.where(known, loss, float("nan")), 0.0)
    tl.store(losses_ptr + offs_m, loss, mask=mask_m)
    tl.store(maximum_ptr + offs_m, base, mask=mask_m)
    tl.store(total_ptr + offs_m, s, mask=mask_m)
    if STATISTICS:
        unknown = tl.where(known, 0.0, float("nan")).to(ACC)
        norm = tl.sqrt(others * inverse * (others * inverse) + squares * inverse * inverse)
        entropy = log_s - weighted_e * inverse
        right = tl.where(beaten == 0, 1.0, 0.0).to(ACC)
        tl.store(statistics_ptr + offs_m, tl.where(counted, norm + unknown, 0.0), mask=mask_m)
        tl.store(
            statistics_ptr + rows + offs_m, tl.where(counted, right + unknown, 0.0), mask=mask_m
        )
        tl.store(statistics_ptr + 2 * rows + offs_m, tl.where(counted, entropy, 0.0), mask=mask_m)
    if GRADIENT:
        cotangent = tl.load(cotangent_ptr + offs_m, mask=mask_m, other=0.0).to(ACC)
        cotangent = tl.where(known, cotangent, float("nan"))
        for first in range(0, end, BLOCK_C):
            offs_c = first + tl.arange(0, BLOCK_C)
            mask_c = offs_c < classes
            mask = mask_m[:, None] & mask_c[None, :]
            if not WHOLE:
                at = start[:, None] + offs_c[None, :].to(tl.int64) * stride_xc
                x = tl.load(logits_ptr + at, mask=mask, other=float("-inf")).to(ACC)
                e = tl.exp(x - base[:, None])
            weight = load_class_weight(class_weight_ptr, offs_c, mask_c, WEIGHTED, ACC)
            slope = logit_gradient(
                e * inverse[:, None],
                offs_c[None, :] == label[:, None],
                weight[None, :],
                label_share[:, None],
                smooth_share,
                mass[:, None],
            )
            slope = tl.where(counted[:, None], cotangent[:, None] * slope, 0.0)
            out = gradient_ptr + offs_m[:, None] * classes + offs_c[None, :]
            tl.store(out, slope.to(gradient_ptr.dtype.element_ty), mask=mask)


@triton.jit
def cross_entropy_backward_kernel(
    logits_ptr,
    labels_ptr,
    class_weight_ptr,
    weight_sum_ptr,
    maximum_ptr,
    total_ptr,
    cotangent_ptr,
    gradient_ptr,
    rows,
    classes,
    positions,
    stride_xb,
    stride_xt,
    stride_xc,
    ignore_index,
    WEIGHTED: tl.constexpr,
    SMOOTHING: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGNED: tl.constexpr,
    ACC: tl.constexpr,
):
    """cotangent_i * d l_i/d logits, one tile a program.

    Grid [cdiv(M, BLOCK_M), cdiv(C, BLOCK_C)]; moves each logit once and its gradient once.
    """
    classes *= ALIGNED
    # widened first: a stride may fit into int32 only while it is divided
    stride_xb = tl.cast(stride_xb, tl.int64) * ALIGNED
    stride_xt = tl.cast(stride_xt, tl.int64) * ALIGNED
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_m, mask_c = offs_m < rows, offs_c < classes
    mask = mask_m[:, None] & mask_c[None, :]
    label, counted, known = load_labels(labels_ptr, offs_m, mask_m, classes, ignore_index)
    label_share, smooth_share, mass = shares(
        label, known, class_weight_ptr, weight_sum_ptr, classes, WEIGHTED, SMOOTHING, ACC
    )
    base = tl.load(maximum_ptr + offs_m, mask=mask_m, other=0.0)
    s = tl.load(total_ptr + offs_m, mask=mask_m, other=1.0)
    cotangent = tl.load(cotangent_ptr + offs_m, mask=mask_m, other=0.0).to(ACC)
    cotangent = tl.where(known, cotangent, float("nan"))
    at = row_offsets(offs_m, positions, stride_xb, stride_xt)[:, None]
    at = at + offs_c[None, :].to(tl.int64) * stride_xc
    x = tl.load(logits_ptr + at, mask=mask, other=float("-inf")).to(ACC)
    weight = load_class_weight(class_weight_ptr, offs_c, mask_c, WEIGHTED, ACC)
    slope = logit_gradient(
        tl.exp(x - base[:, None]) * reciprocal(s, ACC)[:, None],
        offs_c[None, :] == label[:, None],
        weight[None, :],
        label_share[:, None],
        smooth_share,
        mass[:, None],
    )
    slope = tl.where(counted[:, None], cotangent[:, None] * slope, 0.0)
    out = gradient_ptr + offs_m[:, None] * classes + offs_c[None, :]
    tl.store(out, slope.to(gradient_ptr.dtype.element_ty), mask=mask)


def cross_entropy(
    logits: Tensor,  # [B, C] or [B, T, C], any strides
    target: Target,
    cotangent: Tensor | None,  # [M]; asks for the gradient
    statistics: bool,
) -> RowCrossEntropy:
    """All that one pass gives of the M = B (T) rows."""
    classes, rows = logits.shape[-1], target.labels.numel()
    wide = accumulator(logits.dtype)
    new = lambda *shape: torch.empty(shape, dtype=wide, device=logits.device)  # noqa: E731
    gradient_shape = (0, classes) if cotangent is None else (rows, classes)
    out = RowCrossEntropy(
        new(rows),
        new(rows),
        new(rows),
        new(3, rows if statistics else 0),
        torch.empty(gradient_shape, dtype=logits.dtype, device=logits.device),
    )
    tile = tile_of(classes, wide, sums=statistics or target.label_smoothing > 0)
    aligned = _alignment(logits)
    launch(
        cross_entropy_kernel,
        (triton.cdiv(rows, tile.rows),),
        *(logits, target.labels.contiguous(), *class_weights(target)),
        None if cotangent is None else cotangent.contiguous(),
        *out,
        *(rows, *_row_layout(logits, aligned), target.ignore_index),
        WEIGHTED=target.class_weight is not None,
        SMOOTHING=target.label_smoothing,
        STATISTICS=statistics,
        GRADIENT=cotangent is not None,
        WHOLE=tile.whole,
        BLOCK_M=tile.rows,
        BLOCK_C=tile.columns,
        ALIGNED=aligned,
        ACC=TRITON_DTYPE[wide],
        num_warps=tile.warps,
    )
    return out


def cross_entropy_backward(
    logits: Tensor,
    target: Target,
    maximum: Tensor,
    total: Tensor,
    cotangent: Tensor,  # [M]
) -> Tensor:
    """cotangent_i * d l_i/d logits [M, C] from what the forward left."""
    classes, rows = logits.shape[-1], target.labels.numel()
    gradient = torch.empty((rows, classes), dtype=logits.dtype, device=logits.device)
    wide = accumulator(logits.dtype)
    tile, aligned = gradient_tile_of(classes, wide), _alignment(logits)
    launch(
        cross_entropy_backward_kernel,
        (triton.cdiv(rows, tile.rows), triton.cdiv(classes, tile.columns)),
        *(logits, target.labels.contiguous(), *class_weights(target)),
        *(maximum, total, cotangent.contiguous(), gradient),
        *(rows, *_row_layout(logits, aligned), target.ignore_index),
        WEIGHTED=target.class_weight is not None,
        SMOOTHING=target.label_smoothing,
        BLOCK_M=tile.rows,
        BLOCK_C=tile.columns,
        ALIGNED=aligned,
        ACC=TRITON_DTYPE[wide],
        num_warps=tile.warps,
    )
    return gradient


def _alignment(logits: Tensor) -> int:
    """A power of two that divides rows' length and starts: 8 for 1000 classes, which triton, that
    looks at arguments for multiples of 16 alone, would read entry by entry."""
    return math.gcd(16, logits.shape[-1], *logits.stride()[:-1])


def _row_layout(logits: Tensor, aligned: int) -> tuple[int, int, int, int, int]:
    """Classes and positions of a sample, strides of sample, position and class; what `_alignment`
    divides is divided by it."""
    *rows, classes = logits.shape
    positions = rows[1] if len(rows) == 2 else 1
    stride_xb, stride_xt, stride_xc = (*logits.stride()[:-1], 0)[:2] + logits.stride()[-1:]
    return classes // aligned, positions, stride_xb // aligned, stride_xt // aligned, stride_xc
