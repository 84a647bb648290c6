"""Losses of hidden @ weight^T + bias, the logits never written.

A tile of logits [BLOCK_M, BLOCK_N] is used up as soon as it is made: what stays of a row is a
maximum and a sum.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mts_fast.backends.triton.launch import launch
from mts_fast.backends.triton.kernels.logits_tile import Problem, RowLosses, logits_tile, new_accumulator, splits_of
from mts_fast.backends.triton.kernels.row_softmax import (
    online_softmax_update,
    class_weights,
    finite_maximum,
    load_class_weight,
    load_labels,
    shares,
)

MERGE_BLOCK = 128


@triton.jit
def linear_cross_entropy_forward_kernel(
    hidden_ptr, weight_ptr, bias_ptr, labels_ptr, class_weight_ptr, partial_ptr,
    rows, classes, width, ignore_index, tiles_per_split,
    HAS_BIAS: tl.constexpr, WEIGHTED: tl.constexpr, SMOOTHING: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, OPERAND: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """RowLosses statistics of BLOCK_M rows over one split of the classes.

    Grid [cdiv(M, BLOCK_M), splits]; neighbours in the grid read the same classes. partial
    [5, splits, M]: maximum, sum, label's logit, sum of class weight times (logit - maximum), sum of
    class weights.
    """
    first_m = tl.program_id(0).to(tl.int64) * BLOCK_M
    offs_m = first_m + tl.arange(0, BLOCK_M)
    split = tl.program_id(1)
    mask_m = offs_m < rows
    label = load_labels(labels_ptr, offs_m, mask_m, classes, ignore_index)[0]
    m = tl.full([BLOCK_M], float("-inf"), ACC)
    s = tl.zeros([BLOCK_M], ACC)
    x_label = tl.zeros([BLOCK_M], ACC)
    weights_seen = tl.zeros([BLOCK_M], ACC)
    differences = tl.zeros([BLOCK_M], ACC)
    for tile in range(split * tiles_per_split, (split + 1) * tiles_per_split):
        first_n = tl.cast(tile, tl.int64) * BLOCK_N
        offs_n = first_n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < classes
        x = logits_tile(
            hidden_ptr, weight_ptr, bias_ptr, first_m, first_n, mask_m, mask_n, width,
            HAS_BIAS, BLOCK_K, PRECISION, OPERAND, ACC,
        )  # fmt: skip
        x_label += tl.sum(tl.where(offs_n[None, :] == label[:, None], x, 0.0), axis=1)
        m, s, shifted, _e, _decay, drop = online_softmax_update(x, m, s)
        if SMOOTHING > 0:
            weight = load_class_weight(class_weight_ptr, offs_n, mask_n, WEIGHTED, ACC)
            terms = tl.where(mask_n[None, :], weight[None, :] * shifted, 0.0)
            differences += weights_seen * drop + tl.sum(terms, axis=1)
            weights_seen += tl.sum(weight, axis=0)
    block = tl.cast(tl.num_programs(1), tl.int64) * rows
    out = partial_ptr + tl.cast(split, tl.int64) * rows + offs_m
    tl.store(out, m, mask=mask_m)
    tl.store(out + block, s, mask=mask_m)
    tl.store(out + 2 * block, x_label, mask=mask_m)
    tl.store(out + 3 * block, differences, mask=mask_m)
    tl.store(out + 4 * block, weights_seen, mask=mask_m)


@triton.jit
def linear_cross_entropy_merge_kernel(
    partial_ptr, labels_ptr, class_weight_ptr, weight_sum_ptr, losses_ptr, maximum_ptr, total_ptr,
    rows, classes, ignore_index, splits,
    WEIGHTED: tl.constexpr, SMOOTHING: tl.constexpr, BLOCK_M: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Losses from the statistics of all splits, in their order. Grid [cdiv(M, BLOCK_M)]."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < rows
    label, counted, known = load_labels(labels_ptr, offs_m, mask_m, classes, ignore_index)
    label_share, smooth_share, _ = shares(
        label, known, class_weight_ptr, weight_sum_ptr, classes, WEIGHTED, SMOOTHING, ACC
    )
    m = tl.full([BLOCK_M], float("-inf"), ACC)
    block = tl.cast(splits, tl.int64) * rows
    for split in range(0, splits):
        m = tl.maximum(m, tl.load(partial_ptr + split * rows + offs_m, mask=mask_m, other=0.0))
    base = finite_maximum(m)
    s = tl.zeros([BLOCK_M], ACC)
    x_label = tl.zeros([BLOCK_M], ACC)
    differences = tl.zeros([BLOCK_M], ACC)
    weights = tl.zeros([BLOCK_M], ACC)
    for split in range(0, splits):
        at = partial_ptr + split * rows + offs_m
        own = tl.load(at, mask=mask_m, other=0.0)
        s += tl.load(at + block, mask=mask_m, other=1.0) * tl.exp(own - base)
        x_label += tl.load(at + 2 * block, mask=mask_m, other=0.0)
        if SMOOTHING > 0:
            seen = tl.load(at + 4 * block, mask=mask_m, other=0.0)
            gap = tl.where(own == float("-inf"), 0.0, own - base)
            differences += tl.load(at + 3 * block, mask=mask_m, other=0.0) + seen * gap
            weights += seen
    log_s = tl.log(s)
    loss = label_share * ((base - x_label) + log_s)
    if SMOOTHING > 0:
        loss += smooth_share * (weights * log_s - differences)
    loss = tl.where(counted, tl.where(known, loss, float("nan")), 0.0)
    tl.store(losses_ptr + offs_m, loss, mask=mask_m)
    tl.store(maximum_ptr + offs_m, base, mask=mask_m)
    tl.store(total_ptr + offs_m, s, mask=mask_m)


def linear_cross_entropy(problem: Problem) -> RowLosses:
    """Losses of M rows: one product with the weight, cut into splits of the classes."""
    rows, classes, width = problem.sizes
    # smoothing sums up more of a tile, which is then kept smaller
    tile = problem.tile(products=2 if problem.target.label_smoothing else 1)
    splits, tiles_per_split = splits_of(rows, classes, tile)
    partial = new_accumulator(problem, 5, splits, rows)
    weight, weight_sum = class_weights(problem.target)
    grid = (triton.cdiv(rows, tile["BLOCK_M"]), splits)
    labels = problem.target.labels.contiguous()
    launch(
        linear_cross_entropy_forward_kernel,
        grid,
        *(problem.hidden, problem.weight, problem.bias, labels, weight, partial),
        *(rows, classes, width, problem.target.ignore_index, tiles_per_split),
        **tile,
    )
    out = RowLosses(*(new_accumulator(problem, rows) for _ in RowLosses._fields))
    launch(
        linear_cross_entropy_merge_kernel,
        (triton.cdiv(rows, MERGE_BLOCK),),
        *(partial, labels, weight, weight_sum, *out, rows, classes, problem.target.ignore_index, splits),
        WEIGHTED=tile["WEIGHTED"],
        SMOOTHING=tile["SMOOTHING"],
        BLOCK_M=MERGE_BLOCK,
        ACC=tile["ACC"],
    )
    return out
