"""Rows of logits, tile by tile: labels, online softmax and gradient, for all cross-entropies."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mts_fast.reference.target import Target


def class_weights(target: Target) -> tuple[Tensor | None, Tensor | None]:
    """The weights [C] and, where smoothing needs it, their sum []."""
    if target.class_weight is None:
        return None, None
    weight = target.class_weight.contiguous()
    return weight, weight.double().sum() if target.label_smoothing else None


@triton.jit
def finite_maximum(m):
    """m, and 0 where a row has no entry above -inf yet: -inf - (-inf) would be NaN."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def online_softmax_update(x, m, s):
    """Take a tile x [BLOCK_M, BLOCK_C] (absent entries -inf) into the running maximum m and
    s = sum exp(x - m), [BLOCK_M].

    Returns the new (m, s), x - m and exp(x - m) of the tile, and how old sums of exponentials and
    old sums of differences x - m follow the new maximum: times `decay`, and plus `drop` a term.
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
    """d l/d logits of a tile: mass softmax - label_share onehot - smooth_share class_weight.

    l = label_share (lse - x_y) + smooth_share sum_j class_weight_j (lse - x_j), and
    mass = label_share + smooth_share sum_j class_weight_j; all but the tile are [BLOCK_M, 1].
    """
    target = tl.where(is_label, label_share, 0.0) + smooth_share * class_weight
    return mass * softmax - target


@triton.jit
def load_labels(labels_ptr, offs_m, mask_m, classes, ignore_index):
    """Labels [BLOCK_M] as int32, -1 where there is none, with which rows count and which of those
    have a label in [0, C)."""
    label = tl.load(labels_ptr + offs_m, mask=mask_m, other=ignore_index)
    counted = mask_m & (label != ignore_index)
    known = counted & (label >= 0) & (label < classes)
    return tl.where(known, label, -1).to(tl.int32), counted, known


@triton.jit
def row_offsets(offs_m, positions, stride_xb, stride_xt):
    """Where rows m = b T + t of [B, T, C] begin, in entries."""
    return (offs_m // positions) * stride_xb + (offs_m % positions) * stride_xt


@triton.jit
def shares(label, known, class_weight_ptr, weight_sum_ptr, classes, WEIGHTED, SMOOTHING, ACC):
    """Label share, smooth share and their mass (see `logit_gradient`) of rows [BLOCK_M]."""
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
    """Weights [BLOCK_C] of a tile's classes; 1 without weights, 0 outside."""
    if WEIGHTED:
        weight = tl.load(class_weight_ptr + offs_c, mask=mask_c, other=0.0).to(ACC)
    else:
        weight = tl.where(mask_c, 1.0, 0.0).to(ACC)
    return weight
