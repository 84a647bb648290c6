"""Labels, online softmax and gradient of a tile of logits, for all cross-entropy kernels."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mts_fast.reference.target import Target


def class_weights(target: Target) -> tuple[Tensor | None, Tensor | None]:
    """The class weights [C] and, where labels are smoothed, their sum []; None without weights."""
    if target.class_weight is None:
        return None, None
    weight = target.class_weight.contiguous()
    return weight, weight.double().sum() if target.label_smoothing else None


@triton.jit
def finite_maximum(m):
    """m, but 0 where all entries of a row so far are -inf: -inf - (-inf) would be NaN."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def online_softmax_update(x, m, s):
    """Add a tile x [BLOCK_M, BLOCK_C] (-inf outside the logits) to the running maximum m and the
    running sum s = sum exp(x - m), both [BLOCK_M].

        m' = max(m, max_tile x)
        s' = decay s + sum_tile exp(x - m')

    Sums over earlier tiles, taken under the old maximum m, become sums under m' by
    decay = exp(m - m') and drop = m - m':

        sum exp(x - m') = decay sum exp(x - m)
        sum w (x - m')  = sum w (x - m) + drop sum w

    Returns m', s', x - m' and exp(x - m') of the tile, decay, drop. While all entries of a row are
    -inf, 0 stands for its maximum in all differences, and drop is 0.
    """
    m_new = tl.maximum(m, tl.max(x, axis=1))
    base = finite_maximum(m_new)
    decay = tl.exp(m - base)
    drop = tl.where(m == float("-inf"), 0.0, m - base)
    shifted = x - base[:, None]
    e = tl.exp(shifted)
    return m_new, s * decay + tl.sum(e, axis=1), shifted, e, decay, drop


@triton.jit
def logit_gradient(softmax, is_label, class_weight, label_share, smooth_share, mass):
    """d l/d logits of a tile [BLOCK_M, BLOCK_C]; label_share and mass are [BLOCK_M, 1],
    smooth_share is [1], class_weight [1, BLOCK_C].

        l        = label_share (lse - x_y) + smooth_share sum_j class_weight_j (lse - x_j)
        mass     = label_share + smooth_share sum_j class_weight_j
        d l/dx_c = mass softmax_c - label_share [c = y] - smooth_share class_weight_c
    """
    target = tl.where(is_label, label_share, 0.0) + smooth_share * class_weight
    return mass * softmax - target


@triton.jit
def load_labels(labels_ptr, offs_m, mask_m, classes, ignore_index):
    """(label, counted, known) of rows [BLOCK_M]: counted rows are not ignored, known ones have a
    label in [0, C) as well; label is int32, and -1 where it is not known."""
    label = tl.load(labels_ptr + offs_m, mask=mask_m, other=ignore_index)
    counted = mask_m & (label != ignore_index)
    known = counted & (label >= 0) & (label < classes)
    return tl.where(known, label, -1).to(tl.int32), counted, known


@triton.jit
def row_offsets(offs_m, positions, stride_xb, stride_xt):
    """Offsets, in entries, of the rows m = b T + t of logits [B, T, C]."""
    return (offs_m // positions) * stride_xb + (offs_m % positions) * stride_xt


@triton.jit
def shares(label, known, class_weight_ptr, weight_sum_ptr, classes, WEIGHTED, SMOOTHING, ACC):
    """(label_share, smooth_share, mass) of rows [BLOCK_M], as in `logit_gradient`.

    label_share  = (1 - smoothing) class_weight_y    (class_weight 1 without weights)
    smooth_share = smoothing / C
    """
    label_share = tl.full(label.shape, 1.0 - SMOOTHING, ACC)
    smooth_share = tl.full([1], SMOOTHING, ACC) / classes
    weight_sum = tl.full([1], 1.0, ACC) * classes
    if WEIGHTED:
        label_share *= tl.load(class_weight_ptr + label, mask=known, other=0.0).to(ACC)
        if SMOOTHING > 0:
            weight_sum = tl.full([1], 1.0, ACC) * tl.load(weight_sum_ptr).to(ACC)
    return label_share, smooth_share, label_share + smooth_share * weight_sum


@triton.jit
def load_class_weight(class_weight_ptr, offs_c, mask_c, WEIGHTED, ACC):
    """Class weights [BLOCK_C] of a tile; 1 without weights, 0 outside [0, C)."""
    if WEIGHTED:
        weight = tl.load(class_weight_ptr + offs_c, mask=mask_c, other=0.0).to(ACC)
    else:
        weight = tl.where(mask_c, 1.0, 0.0).to(ACC)
    return weight
