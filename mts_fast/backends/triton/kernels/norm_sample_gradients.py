"""Every sample's gradients of a norm's weight and bias, without writing the normalised input.

weight_ic = sum over positions of x^ b, bias_ic = sum of b, with x^ = (x - mean) rstd. A row of a
layer norm, and a group of a group norm where it fits, is normalised in registers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mts_fast.backends.triton.eligibility import accumulator
from mts_fast.backends.triton.kernels.arithmetic import TRITON_DTYPE
from mts_fast.backends.triton.launch import launch

# bytes, in the accumulator's dtype, of a row or group that stays in registers: 16 warps with 16
# float32 a thread
WHOLE_BYTES = 32_768
# of a tile of several rows or of a part of a group, and of a tile per warp: twice as many of either
# spill registers
TILE_BYTES = 4096
BYTES_PER_WARP = 1024
MOST_WARPS = 16
# rows of a layer norm that a program adds up: its partial sums are then 1/16 of what it reads in
# bfloat16
ROWS = 32
# channels of a tile that lie side by side in memory: 64 bytes of bfloat16. 128 spill registers
SIDE_BY_SIDE = 32
# of int32
LARGEST_OFFSET = 2**31 - 1


class RowTile(NamedTuple):
    """Rows and channels that a program of the layer norm takes at a time, how often, its warps."""

    rows: int
    channels: int
    tiles: int
    warps: int


class GroupTile(NamedTuple):
    """Channels and positions that a program of the group norm takes at a time, and its warps."""

    channels: int
    positions: int
    whole: bool  # the tile has all channels and positions of a group
    warps: int


def longest_row(acc_dtype: torch.dtype) -> int:
    """Channels of the longest row that the layer norm's kernel takes."""
    return WHOLE_BYTES // acc_dtype.itemsize


def row_tile(positions: int, channels: int, acc_dtype: torch.dtype) -> RowTile:
    """The tile for rows of a layer norm."""
    columns = triton.next_power_of_2(channels)
    fitting = max(1, TILE_BYTES // acc_dtype.itemsize // columns)
    rows = min(fitting, ROWS, triton.next_power_of_2(max(positions, 1)))
    tiles = triton.cdiv(min(ROWS, max(positions, 1)), rows)
    return RowTile(rows, columns, tiles, _warps(rows * columns, acc_dtype))


def group_tile(
    channels: int, positions: int, acc_dtype: torch.dtype, *, whole: bool, channels_last: bool
) -> GroupTile:
    """The tile for a group of a group norm; `whole`: it is to have all of the group if it fits."""
    columns, length = triton.next_power_of_2(channels), triton.next_power_of_2(max(positions, 1))
    entries = columns * length
    if not whole or entries * acc_dtype.itemsize > WHOLE_BYTES:
        entries = TILE_BYTES // acc_dtype.itemsize
        # the axis that is contiguous in memory first
        if channels_last:
            columns = min(columns, SIDE_BY_SIDE)
            length = min(length, entries // columns)
        else:
            length = min(length, entries)
            columns = min(columns, entries // length)
        whole = False
    return GroupTile(columns, length, whole, _warps(columns * length, acc_dtype))


def _warps(entries: int, acc_dtype: torch.dtype) -> int:
    return min(max(1, entries * acc_dtype.itemsize // BYTES_PER_WARP), MOST_WARPS)


@triton.jit
def layer_norm_sample_gradients_kernel(
    x_ptr,
    b_ptr,
    weight_ptr,
    bias_ptr,
    positions,
    channels,
    chunks,
    stride_xb,
    stride_xt,
    stride_xc,
    stride_bb,
    stride_bt,
    stride_bc,
    CENTERED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TILES: tl.constexpr,
    EPS: tl.constexpr,
    ACC: tl.constexpr,
):
    """weight, bias [B, chunks, C]: sums of x^ b and of b over a chunk, TILES BLOCK_T rows of a
    sample, with the layer norm x^ of x (RMS norm where not CENTERED: mean_t = 0):

        mean_t = sum_c x_tc / C,  rstd_t = 1 / sqrt(sum_c (x_tc - mean_t)^2 / C + eps)
        x^_tc  = (x_tc - mean_t) rstd_t

    Grid [B chunks]; tiles [BLOCK_T, BLOCK_C], which have all channels. Reads x and b once, and
    writes two accumulators for each channel of a chunk.
    """
    # 1. the sample and chunk of this program
    pid = tl.program_id(0).to(tl.int64)
    sample = pid // chunks
    first_row = pid % chunks * (TILES * BLOCK_T)
    offs_t, offs_c = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_C)
    mask_c = offs_c < channels
    at_x = x_ptr + sample * stride_xb
    at_b = b_ptr + sample * stride_bb
    weight = tl.zeros([BLOCK_T, BLOCK_C], ACC)
    bias = tl.zeros([BLOCK_T, BLOCK_C], ACC)
    for i in range(TILES):
        # 2. load a tile of both
        first = first_row + i * BLOCK_T
        mask_t = first + offs_t < positions
        mask = mask_t[:, None] & mask_c[None, :]
        offs_x = offs_t[:, None] * stride_xt + offs_c[None, :] * stride_xc
        offs_b = offs_t[:, None] * stride_bt + offs_c[None, :] * stride_bc
        x = tl.load(at_x + first * stride_xt + offs_x, mask=mask, other=0.0).to(ACC)
        b = tl.load(at_b + first * stride_bt + offs_b, mask=mask, other=0.0).to(ACC)
        # 3. mean and rstd of each row; 0 outside the rows, where 1 / sqrt(eps) may be infinite
        if CENTERED:
            mean = tl.sum(x, axis=1) / channels
            x = tl.where(mask, x - mean[:, None], 0.0)
        variance = tl.sum(x * x, axis=1) / channels
        rstd = tl.where(mask_t, tl.rsqrt(variance + tl.full([1], EPS, ACC)), 0.0)
        # 4. sums of each row of the tile
        weight += x * rstd[:, None] * b
        if HAS_BIAS:
            bias += b
    # 5. over the rows of the tile; the sum over chunks is torch's
    out = pid * channels + offs_c
    tl.store(weight_ptr + out, tl.sum(weight, axis=0), mask=mask_c)
    if HAS_BIAS:
        tl.store(bias_ptr + out, tl.sum(bias, axis=0), mask=mask_c)


@triton.jit
def group_norm_sample_gradients_kernel(
    x_ptr,
    b_ptr,
    mean_ptr,
    variance_ptr,
    weight_ptr,
    bias_ptr,
    channels,
    groups,
    group_channels,
    positions,
    stride_xb,
    stride_xc,
    stride_xs,
    stride_bb,
    stride_bc,
    stride_bs,
    HAS_STATISTICS: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    EPS: tl.constexpr,
    ACC: tl.constexpr,
):
    """weight, bias [B, C]: sums of x^ b and of b over the positions, with the group norm x^ of x.

    Grid [B groups]; tiles [BLOCK_C, BLOCK_S] of a group. Reads x and b once where the tile is WHOLE
    or the statistics [C] are passed (batch norm; a group is then any block of channels), else x
    once more, from the L2 cache. Mean m and sum of squares q of the n entries read so far take in
    those m_tile and q_tile of n_tile more by Chan's formula, with d = m_tile - m, n' = n + n_tile:

        m' = m + d n_tile / n',  q' = q + q_tile + d^2 n n_tile / n'
    """
    # 1. the sample and group of this program
    pid = tl.program_id(0).to(tl.int64)
    sample = pid // groups
    first_c = pid % groups * group_channels
    end_c = tl.minimum(group_channels, channels - first_c)
    offs_c, offs_s = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_S)
    at_x = x_ptr + sample * stride_xb + first_c * stride_xc
    at_b = b_ptr + sample * stride_bb + first_c * stride_bc
    offs_x = offs_c[:, None] * stride_xc + offs_s[None, :] * stride_xs
    offs_b = offs_c[:, None] * stride_bc + offs_s[None, :] * stride_bs
    # WHOLE: loops with one iteration and a compile-time bound, so they are unrolled
    last_c = BLOCK_C if WHOLE else end_c.to(tl.int32)
    last_s = BLOCK_S if WHOLE else positions
    # 2. mean and rstd of the group
    x = tl.zeros([BLOCK_C, BLOCK_S], ACC)
    mean = tl.zeros([BLOCK_C], ACC)
    rstd = tl.zeros([BLOCK_C], ACC)
    if not HAS_STATISTICS:
        center = tl.zeros([1], ACC)
        squares = tl.zeros([1], ACC)
        count = tl.zeros([1], ACC)
        for c in range(0, last_c, BLOCK_C):
            for s in range(0, last_s, BLOCK_S):
                mask = (c + offs_c < end_c)[:, None] & (s + offs_s < positions)[None, :]
                at = at_x + tl.cast(c, tl.int64) * stride_xc + tl.cast(s, tl.int64) * stride_xs
                x = tl.load(at + offs_x, mask=mask, other=0.0).to(ACC)
                size = tl.minimum(BLOCK_C, end_c - c) * tl.minimum(BLOCK_S, positions - s)
                size = size.to(ACC)
                tile_mean = tl.sum(tl.sum(x, axis=1), axis=0) / size
                gap = tl.where(mask, x - tile_mean, 0.0)
                tile_squares = tl.sum(tl.sum(gap * gap, axis=1), axis=0)
                drift = tile_mean - center
                total = count + size
                center += drift * (size / total)
                squares += tile_squares + drift * drift * (count * (size / total))
                count = total
        mean += center
        rstd += tl.rsqrt(squares / count + tl.full([1], EPS, ACC))
    # 3. the sums of each channel
    for c in range(0, last_c, BLOCK_C):
        mask_c = c + offs_c < end_c
        if HAS_STATISTICS:
            mean = tl.load(mean_ptr + first_c + c + offs_c, mask=mask_c, other=0.0).to(ACC)
            variance = tl.load(variance_ptr + first_c + c + offs_c, mask=mask_c, other=1.0)
            rstd = tl.rsqrt(variance.to(ACC) + tl.full([1], EPS, ACC))
        weight = tl.zeros([BLOCK_C, BLOCK_S], ACC)
        bias = tl.zeros([BLOCK_C, BLOCK_S], ACC)
        for s in range(0, last_s, BLOCK_S):
            mask = mask_c[:, None] & (s + offs_s < positions)[None, :]
            if HAS_STATISTICS or not WHOLE:
                at = at_x + tl.cast(c, tl.int64) * stride_xc + tl.cast(s, tl.int64) * stride_xs
                x = tl.load(at + offs_x, mask=mask, other=0.0).to(ACC)
            at = at_b + tl.cast(c, tl.int64) * stride_bc + tl.cast(s, tl.int64) * stride_bs
            b = tl.load(at + offs_b, mask=mask, other=0.0).to(ACC)
            weight += tl.where(mask, x - mean[:, None], 0.0) * b
            bias += b
        out = sample * channels + first_c + c + offs_c
        tl.store(weight_ptr + out, tl.sum(weight, axis=1) * rstd, mask=mask_c)
        tl.store(bias_ptr + out, tl.sum(bias, axis=1), mask=mask_c)


def layer_norm_sample_gradients(
    x: Tensor, b: Tensor, eps: float, centered: bool, bias: bool
) -> Tensor:
    """[2, B, C], weight and bias, of x, b [B, T, C], in any strides; [1, B, C] without bias.
    float32, and float64 where one is float64."""
    samples, positions, channels = x.shape
    acc_dtype = accumulator(torch.promote_types(x.dtype, b.dtype))
    tile = row_tile(positions, channels, acc_dtype)
    chunks = max(1, triton.cdiv(positions, tile.rows * tile.tiles))
    shape = (2 if bias else 1, samples, chunks, channels)
    partial = torch.empty(shape, dtype=acc_dtype, device=x.device)
    launch(
        layer_norm_sample_gradients_kernel,
        (samples * chunks,),
        *(x, b, partial[0], partial[1] if bias else None, positions, channels, chunks),
        *(*x.stride(), *b.stride()),
        CENTERED=centered,
        HAS_BIAS=bias,
        BLOCK_T=tile.rows,
        BLOCK_C=tile.channels,
        TILES=tile.tiles,
        EPS=eps,
        ACC=TRITON_DTYPE[acc_dtype],
        num_warps=tile.warps,
    )
    return partial.squeeze(2) if chunks == 1 else partial.sum(2)


def group_norm_sample_gradients(
    x: Tensor,
    b: Tensor,
    groups: int,
    eps: float,
    mean: Tensor | None,
    variance: Tensor | None,
) -> Tensor:
    """[2, B, C], weight and bias, of x, b [B, C, S], in any strides, mean and variance [C];
    float32, and float64 where one is float64."""
    samples, channels, positions = x.shape
    acc_dtype = accumulator(torch.promote_types(x.dtype, b.dtype))
    normalized = mean is None or variance is None
    tile = group_tile(
        channels // groups if normalized else channels,
        positions,
        acc_dtype,
        whole=normalized,
        channels_last=x.stride(1) < x.stride(2),
    )
    group_channels = channels // groups
    if mean is not None and variance is not None:
        # no sum is over a group: any block of channels is one
        mean, variance = mean.contiguous(), variance.contiguous()
        group_channels, groups = tile.channels, triton.cdiv(channels, tile.channels)
    sums = torch.empty((2, samples, channels), dtype=acc_dtype, device=x.device)
    launch(
        group_norm_sample_gradients_kernel,
        (samples * groups,),
        *(x, b, mean, variance, *sums, channels, groups, group_channels, positions),
        *(*x.stride(), *b.stride()),
        HAS_STATISTICS=not normalized,
        WHOLE=tile.whole,
        BLOCK_C=tile.channels,
        BLOCK_S=tile.positions,
        EPS=eps,
        ACC=TRITON_DTYPE[acc_dtype],
        num_warps=tile.warps,
    )
    return sums


def offsets_fit_int32(*tensors: Tensor) -> bool:
    """Whether the offsets within every tile of these [B, *, *] fit int32: a tile has no more
    entries than WHOLE_BYTES bytes have, so they do unless those are far apart."""
    entries = WHOLE_BYTES // torch.float32.itemsize
    spans = (sum(min(t.shape[i], entries) * t.stride(i) for i in (1, 2)) for t in tensors)
    return max(spans) <= LARGEST_OFFSET
