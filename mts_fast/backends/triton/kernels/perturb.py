"""Norm of many tensors, and parameters moved along a direction, a launch per dtype each."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mts_fast.backends.triton.eligibility import accumulator
from mts_fast.backends.triton.kernels.arithmetic import TRITON_DTYPE
from mts_fast.backends.triton.kernels.pointer_table import (
    BLOCK,
    BLOCKS,
    WARPS,
    block,
    load_pointer,
    locate,
    pointer_table,
    program_map,
    rows_of,
)
from mts_fast.backends.triton.launch import launch


@triton.jit
def square_sum_kernel(
    program_map_ptr,
    table_ptr,
    sums_ptr,
    WIDTH: tl.constexpr,
    ALIGNED: tl.constexpr,
    DTYPE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """sums [programs] of x^2 over each program's chunk, float64.

    Grid [programs]; tiles [BLOCK], BLOCKS of them a program. Reads every entry once, and writes
    8 bytes a program.
    """
    # 1. locate this program's chunk
    _, row_ptr, size, start = locate(program_map_ptr, table_ptr, WIDTH, BLOCK * BLOCKS)
    x_ptr = load_pointer(row_ptr, 0, DTYPE, ALIGNED)
    # 2. sum squares per lane; the last block of a tensor is masked
    total = tl.zeros([BLOCK], ACC)
    for i in range(BLOCKS):
        first = start + i * BLOCK
        if first + BLOCK <= size:
            offs, mask = block(first, size, True, BLOCK)
            x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(ACC)
            total += x * x
        elif first < size:
            offs, mask = block(first, size, False, BLOCK)
            x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(ACC)
            total += x * x
    # 3. sum over the lanes; the sum over programs is torch's
    tl.store(sums_ptr + tl.program_id(0), tl.sum(total, axis=0).to(tl.float64))


@triton.jit
def perturb_block(first, size, p_ptr, v_ptr, out_ptr, scale, WHOLE: tl.constexpr, BLOCK, ACC):
    """out = p + scale v, one block; rounded once to the dtype of p."""
    offs, mask = block(first, size, WHOLE, BLOCK)
    p = tl.load(p_ptr + offs, mask=mask, other=0.0).to(ACC)
    v = tl.load(v_ptr + offs, mask=mask, other=0.0).to(ACC)
    tl.store(out_ptr + offs, (p + scale * v).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def perturb_kernel(
    program_map_ptr,
    table_ptr,
    scale_ptr,
    WIDTH: tl.constexpr,
    ALIGNED: tl.constexpr,
    PARAMETER: tl.constexpr,
    DIRECTION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """moved = parameter + scale [] * direction.

    Grid [programs]; tiles [BLOCK], BLOCKS of them a program. Reads parameter and direction once and
    writes the result once.
    """
    # 1. locate this program's chunk
    _, row_ptr, size, start = locate(program_map_ptr, table_ptr, WIDTH, BLOCK * BLOCKS)
    p_ptr = load_pointer(row_ptr, 0, PARAMETER, ALIGNED)
    v_ptr = load_pointer(row_ptr, 1, DIRECTION, ALIGNED)
    out_ptr = load_pointer(row_ptr, 2, PARAMETER, ALIGNED)
    # 2. load the scale, then move block by block; the last block of a tensor is masked
    scale = tl.load(scale_ptr).to(ACC)
    for i in range(BLOCKS):
        first = start + i * BLOCK
        if first + BLOCK <= size:
            perturb_block(first, size, p_ptr, v_ptr, out_ptr, scale, True, BLOCK, ACC)
        elif first < size:
            perturb_block(first, size, p_ptr, v_ptr, out_ptr, scale, False, BLOCK, ACC)


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Norm [] of all entries, in the dtype that the tensors' dtypes promote to; they are dense."""
    together = rows_of([tensors])
    mappings = [program_map(rows) for rows in together]
    sums = tensors[0].new_empty(sum(map(len, mappings)), dtype=torch.float64)
    written = 0
    for rows, mapping in zip(together, mappings, strict=True):
        table, _ = pointer_table(rows)
        (dtype,) = rows.kind.dtypes
        programs = len(mapping)
        launch(
            square_sum_kernel,
            (programs,),
            *(mapping, table, sums[written : written + programs]),
            WIDTH=table.shape[1],
            ALIGNED=rows.kind.aligned,
            DTYPE=TRITON_DTYPE[dtype],
            ACC=TRITON_DTYPE[accumulator(dtype)],
            BLOCK=BLOCK,
            BLOCKS=BLOCKS,
            num_warps=WARPS,
        )
        written += programs
    promoted = functools.reduce(torch.promote_types, [t.dtype for t in tensors])
    return sums.sum().sqrt().to(promoted)


def perturb(
    parameters: Sequence[Tensor], direction: Sequence[Tensor], scale: Tensor
) -> list[Tensor]:
    """parameter + scale [] * direction; each pair is dense and has one memory layout."""
    moved = [torch.empty_like(p) for p in parameters]
    for rows in rows_of([parameters, direction, moved]):
        table, _ = pointer_table(rows)
        mapping = program_map(rows)
        parameter, along, _ = rows.kind.dtypes
        launch(
            perturb_kernel,
            (len(mapping),),
            *(mapping, table, scale),
            WIDTH=table.shape[1],
            ALIGNED=rows.kind.aligned,
            PARAMETER=TRITON_DTYPE[parameter],
            DIRECTION=TRITON_DTYPE[along],
            ACC=TRITON_DTYPE[accumulator(parameter)],
            BLOCK=BLOCK,
            BLOCKS=BLOCKS,
            num_warps=WARPS,
        )
    return moved
