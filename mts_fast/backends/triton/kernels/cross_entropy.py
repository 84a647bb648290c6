"""Cross-entropy of rows of logits: losses, statistics and gradients from one read of the logits."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mts_fast.backends.triton.eligibility import accumulator
from mts_fast.backends.triton.kernels.arithmetic import TRITON_DTYPE, reciprocal
from mts_fast.backends.triton.kernels.row_softmax import (
    class_weights,
    finite_maximum,
    load_class_weight,
    load_labels,
    logit_gradient,
    online_softmax_update,
    row_offsets,
    shares,
)
from mts_fast.backends.triton.launch import launch
from mts_fast.reference.target import Target

# bytes of a row (in the accumulator's dtype) up to which it stays in registers: 16 warps with 16
# float32 a thread; twice as many bytes spill registers (triton 3.6 and 3.9). Longer rows are read
# in tiles, and once more for the gradient, which the L2 cache serves in part.
WHOLE_BYTES = 32_768
# (tile bytes, warps) for rows read in tiles. Statistics and smoothing keep more values live. These
# sizes do not spill registers; the neighbouring ones do.
LOOP = {torch.float32: (16_384, 8), torch.float64: (16_384, 8)}
LOOP_WITH_SUMS = {torch.float32: (8192, 16), torch.float64: (4096, 8)}
# bytes of a tile of several short rows, of the largest tile of the backward, and of a tile per warp
SMALL_BYTES = 2048
GRADIENT_BYTES = 4096
BYTES_PER_WARP = 2048


class RowCrossEntropy(NamedTuple):
    """The outputs of one pass over M rows; outputs that were not asked for have no entries."""

    losses: Tensor  # [M], float32 (float64 of float64)
    maximum: Tensor  # [M], largest logit
    total: Tensor  # [M], sum of exp(logit - maximum)
    statistics: Tensor  # [3, M]: error norm, correct, entropy
    gradient: Tensor  # [M, C], cotangent times d losses/d logits, in the logits' dtype


class Tile(NamedTuple):
    """Rows and columns that a program takes at a time, and its warps."""

    rows: int
    columns: int
    whole: bool  # the tile has all columns
    warps: int


def tile_of(classes: int, acc_dtype: torch.dtype, *, sums: bool) -> Tile:
    """The tile for rows of `classes` entries; `sums`: there are statistics or smoothing."""
    columns = triton.next_power_of_2(classes)
    if columns * acc_dtype.itemsize > WHOLE_BYTES:
        size, warps = (LOOP_WITH_SUMS if sums else LOOP)[acc_dtype]
        return Tile(1, size // acc_dtype.itemsize, False, warps)
    return _tile_of_columns(columns, acc_dtype)


def gradient_tile_of(classes: int, acc_dtype: torch.dtype) -> Tile:
    """The tile of the backward, where rows may be cut: every entry is independent."""
    columns = min(triton.next_power_of_2(classes), GRADIENT_BYTES // acc_dtype.itemsize)
    return _tile_of_columns(columns, acc_dtype)


def _tile_of_columns(columns: int, acc_dtype: torch.dtype) -> Tile:
    size = columns * acc_dtype.itemsize
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
    """Losses of BLOCK_M rows; their statistics and cotangent times gradient where asked for.

    Grid [cdiv(M, BLOCK_M)]; tiles [BLOCK_M, BLOCK_C]. Reads each logit once (WHOLE; else once more
    for the gradient), and writes 3 or 6 accumulators a row and the gradient once.

    Sums over the classes read so far, with e_c = exp(x_c - m), the label y, class weights w, and
    decay and drop of `online_softmax_update` where a tile moves the maximum m:

        s             = sum e_c              <- decay s + sum_tile e_c
        wrong_sum     = sum_{c != y} e_c     <- decay wrong_sum + sum_tile
        wrong_squares = sum_{c != y} e_c^2   <- decay^2 wrong_squares + sum_tile
        weighted_e    = sum e_c (x_c - m)    <- decay (weighted_e + drop s) + sum_tile
        differences   = sum w_c (x_c - m)    <- differences + drop weights_seen + sum_tile
        weights_seen  = sum w_c              <- weights_seen + sum_tile

    and from them, with lse = m + log s and softmax_c = e_c / s:

        loss       = label_share (lse - x_y) + smooth_share sum_c w_c (lse - x_c)
                   = label_share ((m - x_y) + log s)
                     + smooth_share (weights_seen log s - differences)
        error norm = |softmax - onehot| = sqrt(wrong_sum^2 + wrong_squares) / s
        entropy    = -sum_c softmax_c log softmax_c = log s - weighted_e / s
        correct    = no class has a larger logit than y, or an equal one and a lower index
    """
    classes *= ALIGNED
    # cast to int64 before the product: a stride may fit int32 only while divided by ALIGNED
    stride_xb = tl.cast(stride_xb, tl.int64) * ALIGNED
    stride_xt = tl.cast(stride_xt, tl.int64) * ALIGNED
    pid = tl.program_id(0).to(tl.int64)
    offs_m = pid * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < rows
    # 1. load labels, the label's logit and class weight
    label, counted, known = load_labels(labels_ptr, offs_m, mask_m, classes, ignore_index)
    start = row_offsets(offs_m, positions, stride_xb, stride_xt)
    at_label = logits_ptr + start + label.to(tl.int64) * stride_xc
    x_label = tl.load(at_label, mask=known, other=0.0).to(ACC)
    label_share, smooth_share, mass = shares(
        label, known, class_weight_ptr, weight_sum_ptr, classes, WEIGHTED, SMOOTHING, ACC
    )

    # 2. one pass over the tiles: online softmax and the sums above
    m = tl.full([BLOCK_M], float("-inf"), ACC)
    s = tl.zeros([BLOCK_M], ACC)
    wrong_sum = tl.zeros([BLOCK_M], ACC)
    wrong_squares = tl.zeros([BLOCK_M], ACC)
    weighted_e = tl.zeros([BLOCK_M], ACC)
    ranked_ahead = tl.zeros([BLOCK_M], tl.int32)  # classes before the label in order
    weights_seen = tl.zeros([BLOCK_M], ACC)
    differences = tl.zeros([BLOCK_M], ACC)
    e = tl.zeros([BLOCK_M, BLOCK_C], ACC)
    # WHOLE: a loop with one iteration and a compile-time bound, so it is unrolled
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
            e_wrong = tl.where(is_label, 0.0, e)
            wrong_sum = wrong_sum * decay + tl.sum(e_wrong, axis=1)
            wrong_squares = wrong_squares * decay * decay + tl.sum(e_wrong * e_wrong, axis=1)
            # e (x - m) where e is 0 is 0, as 0 * -inf would be NaN; where e is NaN it is NaN
            terms = tl.where(e > 0, e * shifted, tl.where(e == 0, 0.0, e))
            weighted_e = decay * (weighted_e + s_before * drop) + tl.sum(terms, axis=1)
            ahead = (x > x_label[:, None]) | (
                (x == x_label[:, None]) & (offs_c[None, :] < label[:, None])
            )
            ranked_ahead += tl.sum((ahead & mask).to(tl.int32), axis=1)
        if SMOOTHING > 0:
            weight = load_class_weight(class_weight_ptr, offs_c, mask_c, WEIGHTED, ACC)
            terms = tl.where(mask, weight[None, :] * shifted, 0.0)
            differences += weights_seen * drop + tl.sum(terms, axis=1)
            weights_seen += tl.sum(weight, axis=0)

    # 3. losses, from the sums
    log_s, inverse = tl.log(s), reciprocal(s, ACC)
    base = finite_maximum(m)
    loss = label_share * ((base - x_label) + log_s)
    if SMOOTHING > 0:
        loss += smooth_share * (weights_seen * log_s - differences)
    # a label outside [0, C) has no loss: NaN, not the loss of another class
    loss = tl.where(counted, tl.where(known, loss, float("nan")), 0.0)
    tl.store(losses_ptr + offs_m, loss, mask=mask_m)
    tl.store(maximum_ptr + offs_m, base, mask=mask_m)
    tl.store(total_ptr + offs_m, s, mask=mask_m)
    # 4. statistics, from the sums
    if STATISTICS:
        unknown = tl.where(known, 0.0, float("nan")).to(ACC)
        norm = tl.sqrt(
            wrong_sum * inverse * (wrong_sum * inverse) + wrong_squares * inverse * inverse
        )
        entropy = log_s - weighted_e * inverse
        correct = tl.where(ranked_ahead == 0, 1.0, 0.0).to(ACC)
        tl.store(statistics_ptr + offs_m, tl.where(counted, norm + unknown, 0.0), mask=mask_m)
        tl.store(
            statistics_ptr + rows + offs_m, tl.where(counted, correct + unknown, 0.0), mask=mask_m
        )
        tl.store(statistics_ptr + 2 * rows + offs_m, tl.where(counted, entropy, 0.0), mask=mask_m)
    # 5. cotangent times gradient; unless WHOLE, the logits are read again
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
    """cotangent_i * d l_i/d logits, with softmax_ic = exp(x_ic - maximum_i) / total_i; the gradient
    is that of `logit_gradient`.

    Grid [cdiv(M, BLOCK_M), cdiv(C, BLOCK_C)]; a tile [BLOCK_M, BLOCK_C] a program. Reads each logit
    once and writes its gradient once.
    """
    classes *= ALIGNED
    # cast to int64 before the product: a stride may fit int32 only while divided by ALIGNED
    stride_xb = tl.cast(stride_xb, tl.int64) * ALIGNED
    stride_xt = tl.cast(stride_xt, tl.int64) * ALIGNED
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_m, mask_c = offs_m < rows, offs_c < classes
    mask = mask_m[:, None] & mask_c[None, :]
    # 1. load labels and what the forward left of each row
    label, counted, known = load_labels(labels_ptr, offs_m, mask_m, classes, ignore_index)
    label_share, smooth_share, mass = shares(
        label, known, class_weight_ptr, weight_sum_ptr, classes, WEIGHTED, SMOOTHING, ACC
    )
    base = tl.load(maximum_ptr + offs_m, mask=mask_m, other=0.0)
    s = tl.load(total_ptr + offs_m, mask=mask_m, other=1.0)
    cotangent = tl.load(cotangent_ptr + offs_m, mask=mask_m, other=0.0).to(ACC)
    cotangent = tl.where(known, cotangent, float("nan"))
    # 2. load the logits and class weights of the tile
    at = row_offsets(offs_m, positions, stride_xb, stride_xt)[:, None]
    at = at + offs_c[None, :].to(tl.int64) * stride_xc
    x = tl.load(logits_ptr + at, mask=mask, other=float("-inf")).to(ACC)
    weight = load_class_weight(class_weight_ptr, offs_c, mask_c, WEIGHTED, ACC)
    # 3. softmax, gradient, product with the cotangent
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
    """Losses, and statistics and gradient where asked for, of the M = B or B T rows."""
    classes, rows = logits.shape[-1], target.labels.numel()
    acc_dtype = accumulator(logits.dtype)

    def new_accumulator(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=acc_dtype, device=logits.device)

    gradient_shape = (0, classes) if cotangent is None else (rows, classes)
    out = RowCrossEntropy(
        new_accumulator(rows),
        new_accumulator(rows),
        new_accumulator(rows),
        new_accumulator(3, rows if statistics else 0),
        torch.empty(gradient_shape, dtype=logits.dtype, device=logits.device),
    )
    tile = tile_of(classes, acc_dtype, sums=statistics or target.label_smoothing > 0)
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
        ACC=TRITON_DTYPE[acc_dtype],
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
    """cotangent_i * d l_i/d logits [M, C] from the maximum and total of the forward."""
    classes, rows = logits.shape[-1], target.labels.numel()
    gradient = torch.empty((rows, classes), dtype=logits.dtype, device=logits.device)
    acc_dtype = accumulator(logits.dtype)
    tile, aligned = gradient_tile_of(classes, acc_dtype), _alignment(logits)
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
        ACC=TRITON_DTYPE[acc_dtype],
        num_warps=tile.warps,
    )
    return gradient


def _alignment(logits: Tensor) -> int:
    """The largest power of two, up to 16, that divides the number of classes and the strides of
    rows. Triton itself checks arguments for multiples of 16 only, and would load rows of 1000
    classes (a multiple of 8) entry by entry."""
    return math.gcd(16, logits.shape[-1], *logits.stride()[:-1])


def _row_layout(logits: Tensor, aligned: int) -> tuple[int, int, int, int, int]:
    """(classes, positions of a sample, strides of sample, position and class); classes and the
    first two strides are divided by `aligned`, and the kernels multiply them back."""
    *rows, classes = logits.shape
    positions = rows[1] if len(rows) == 2 else 1
    stride_xb, stride_xt, stride_xc = (*logits.stride()[:-1], 0)[:2] + logits.stride()[-1:]
    return classes // aligned, positions, stride_xb // aligned, stride_xt // aligned, stride_xc
