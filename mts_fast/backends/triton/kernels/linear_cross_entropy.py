"""Losses of hidden @ weight^T + bias, the logits never written.

A tile of logits [BLOCK_M, BLOCK_N] is consumed as soon as it is computed; a maximum and a few sums
remain of each row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mts_fast.backends.triton.kernels.logits_tile import (
    Problem,
    RowLosses,
    logits_tile,
    new_accumulator,
    splits_of,
)
from mts_fast.backends.triton.kernels.row_softmax import (
    class_weights,
    finite_maximum,
    load_class_weight,
    load_labels,
    online_softmax_update,
    shares,
)
from mts_fast.backends.triton.launch import launch

# rows per program of the merge
MERGE_BLOCK = 128


@triton.jit
def linear_cross_entropy_forward_kernel(
    hidden_ptr, weight_ptr, bias_ptr, labels_ptr, class_weight_ptr, partial_ptr,
    rows, classes, width, ignore_index, tiles_per_split,
    HAS_BIAS: tl.constexpr, WEIGHTED: tl.constexpr, SMOOTHING: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, OPERAND: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Maximum and sums of BLOCK_M rows over one split of the classes.

    Grid [cdiv(M, BLOCK_M), splits]; tiles [BLOCK_M, BLOCK_N] with products over BLOCK_K inputs at a
    time. Requests hidden cdiv(C, BLOCK_N) times and weight cdiv(M, BLOCK_M) times, which caches
    serve in part: neighbours in the grid read the same classes. Writes 5 accumulators for each row
    and split.

    partial [5, splits, M], with e_c = exp(x_c - m), class weights w, and decay and drop of
    `online_softmax_update` where a tile moves the maximum m:

        m                                  <- max(m, max_tile x)
        s            = sum e_c             <- decay s + sum_tile e_c
        x_label      = x_y, 0 without y    <- x_label + sum_tile [c = y] x_c
        differences  = sum w_c (x_c - m)   <- differences + drop weights_seen + sum_tile
        weights_seen = sum w_c             <- weights_seen + sum_tile
    """
    # 1. load labels
    first_m = tl.program_id(0).to(tl.int64) * BLOCK_M
    offs_m = first_m + tl.arange(0, BLOCK_M)
    split = tl.program_id(1)
    mask_m = offs_m < rows
    label = load_labels(labels_ptr, offs_m, mask_m, classes, ignore_index)[0]
    # 2. online softmax over the split's tiles of logits
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
    # 3. store the partial results
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
    """Losses from the partial results of all splits, merged in their order.

    Grid [cdiv(M, BLOCK_M)]; tile [BLOCK_M]. Reads the maxima of `partial` twice and its other rows
    once, and writes 3 accumulators a row.

    With m_k, s_k, ... the results of split k, each under its maximum m_k:

        m           = max_k m_k
        s           = sum_k s_k exp(m_k - m)
        x_label     = sum_k x_label_k
        differences = sum_k (differences_k + weights_seen_k (m_k - m))
        weights     = sum_k weights_seen_k
        loss        = label_share ((m - x_label) + log s)
                      + smooth_share (weights log s - differences)
    """
    # 1. load labels and their class weights
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < rows
    label, counted, known = load_labels(labels_ptr, offs_m, mask_m, classes, ignore_index)
    label_share, smooth_share, _ = shares(
        label, known, class_weight_ptr, weight_sum_ptr, classes, WEIGHTED, SMOOTHING, ACC
    )
    # 2. the maximum over the splits
    m = tl.full([BLOCK_M], float("-inf"), ACC)
    block = tl.cast(splits, tl.int64) * rows
    for split in range(0, splits):
        m = tl.maximum(m, tl.load(partial_ptr + split * rows + offs_m, mask=mask_m, other=0.0))
    base = finite_maximum(m)
    # 3. the sums over the splits, under that maximum
    s = tl.zeros([BLOCK_M], ACC)
    x_label = tl.zeros([BLOCK_M], ACC)
    differences = tl.zeros([BLOCK_M], ACC)
    weights = tl.zeros([BLOCK_M], ACC)
    for split in range(0, splits):
        at = partial_ptr + split * rows + offs_m
        split_maximum = tl.load(at, mask=mask_m, other=0.0)
        s += tl.load(at + block, mask=mask_m, other=1.0) * tl.exp(split_maximum - base)
        x_label += tl.load(at + 2 * block, mask=mask_m, other=0.0)
        if SMOOTHING > 0:
            weights_seen = tl.load(at + 4 * block, mask=mask_m, other=0.0)
            gap = tl.where(split_maximum == float("-inf"), 0.0, split_maximum - base)
            differences += tl.load(at + 3 * block, mask=mask_m, other=0.0) + weights_seen * gap
            weights += weights_seen
    # 4. losses; NaN for a label outside [0, C), 0 for ignored rows
    log_s = tl.log(s)
    loss = label_share * ((base - x_label) + log_s)
    if SMOOTHING > 0:
        loss += smooth_share * (weights * log_s - differences)
    loss = tl.where(counted, tl.where(known, loss, float("nan")), 0.0)
    tl.store(losses_ptr + offs_m, loss, mask=mask_m)
    tl.store(maximum_ptr + offs_m, base, mask=mask_m)
    tl.store(total_ptr + offs_m, s, mask=mask_m)


def linear_cross_entropy(problem: Problem) -> RowLosses:
    """Losses of M rows: one product with the weight, its classes divided into splits."""
    rows, classes, width = problem.sizes
    # smoothing keeps more values of a tile live, so it gets the smaller tile
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
        *(partial, labels, weight, weight_sum, *out),
        *(rows, classes, problem.target.ignore_index, splits),
        WEIGHTED=tile["WEIGHTED"],
        SMOOTHING=tile["SMOOTHING"],
        BLOCK_M=MERGE_BLOCK,
        ACC=tile["ACC"],
    )
    return out
