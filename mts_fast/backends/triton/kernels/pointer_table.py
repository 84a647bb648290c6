"""One launch over many tensors: a table of their pointers and scalars, and a map of programs.

A row of the table belongs to one parameter and holds its size, the pointers of its tensors
(parameter, gradient, ...; 0 for a missing one) and its scalars. The map gives each program a row
and a chunk of CHUNK entries.
"""

from __future__ import annotations

import functools
import itertools
import operator
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mts_fast._check import fail
from mts_fast._columns import (
    are_missing,
    are_tensors,
    dtypes_of,
    pointers_of,
    sizes_of,
)

# entries per block: 8 a thread with 8 warps, one 16-byte access of 16-bit floats, two of float32
BLOCK = 2048
# blocks per program: one table lookup serves them all
BLOCKS = 4
CHUNK = BLOCK * BLOCKS
WARPS = 8
# bytes of the widest vectorised access of a thread
ACCESS_BYTES = 16
# program maps in the cache: a step has a handful, and several models may take turns
CACHED_MAPS = 64


class Kind(NamedTuple):
    """The launch key of a row: rows of equal key share a launch."""

    dtypes: tuple[torch.dtype, ...]  # of each column of the table
    aligned: bool  # every pointer is a multiple of ACCESS_BYTES


class Rows(NamedTuple):
    """Rows of one kind, without those of empty tensors."""

    kind: Kind
    device: torch.device
    members: list[int]  # which of the parameters they belong to
    sizes: list[int]
    pointers: list[list[int]]  # of each column


def rows_of(columns: Sequence[Sequence[Tensor | None] | None]) -> list[Rows]:
    """The rows of parameters, by kind; each column has a tensor or None for each parameter, or is
    None. A missing tensor has the pointer 0, and the first column's dtype, so that it does not
    split the launch."""
    first = columns[0]
    assert first is not None
    if not first:
        return []
    uniform = _uniform(columns)
    if uniform is not None:
        return [uniform]
    by_kind: dict[Kind, Rows] = {}
    for i, row in enumerate(zip(*(c or [None] * len(first) for c in columns), strict=True)):
        leading = row[0]
        assert leading is not None
        if leading.numel():
            pointers = [0 if t is None else t.data_ptr() for t in row]
            aligned = not any(pointer % ACCESS_BYTES for pointer in pointers)
            kind = Kind(tuple((leading if t is None else t).dtype for t in row), aligned)
            if kind not in by_kind:
                by_kind[kind] = Rows(kind, leading.device, [], [], [[] for _ in row])
            rows = by_kind[kind]
            rows.members.append(i)
            rows.sizes.append(leading.numel())
            for column, pointer in zip(rows.pointers, pointers, strict=True):
                column.append(pointer)
    return list(by_kind.values())


def _uniform(columns: Sequence[Sequence[Tensor | None] | None]) -> Rows | None:
    """The usual case without a loop over the parameters: all are of one kind, and none is empty."""
    first: Any = columns[0]
    sizes = sizes_of(first)
    if 0 in sizes:
        return None
    dtypes, pointers, bits = [], [], 0
    for column in columns:
        if column is None or are_missing(column):
            dtypes.append(first[0].dtype)
            pointers.append([0] * len(sizes))
            continue
        tensors: Any = column
        if not are_tensors(tensors) or len(different := dtypes_of(tensors)) > 1:
            return None
        dtypes.append(different.pop())
        pointers.append(pointers_of(tensors))
        bits = functools.reduce(operator.or_, pointers[-1], bits)
    if bits % ACCESS_BYTES:
        return None
    kind = Kind(tuple(dtypes), aligned=True)
    return Rows(kind, first[0].device, list(range(len(sizes))), sizes, pointers)


def pointer_table(rows: Rows, scalars: Sequence[Sequence[float]] = ()) -> tuple[Tensor, Tensor]:
    """(table, scalars): int64 [T, 1 + columns + N] with size, pointers and scalars of each row, and
    a float64 view [T, N] of its last N columns. One copy to the device, and the host does not wait
    for it.
    """
    if rows.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # the graph would hold the address of pinned memory that others use at its replay
        hint = "capture with use_backend('reference'), or keep this call out of the graph"
        expected = "outside of a CUDA graph's capture"
        fail(RuntimeError, "pointer_table", "the call", expected, "one inside", hint)
    integers = array("q", rows.sizes)
    for column in rows.pointers:
        integers.extend(column)
    width = 1 + len(rows.pointers)
    count = len(scalars[0]) if scalars else 0
    # the allocator reuses pinned memory only after the copy has ended
    pinned = rows.device.type == "cuda"
    table = torch.empty((len(rows.sizes), width + count), dtype=torch.int64, pin_memory=pinned)
    table[:, :width] = torch.frombuffer(integers, dtype=torch.int64).view(width, -1).t()
    if count:
        floats = array("d", itertools.chain.from_iterable(scalars))
        values = torch.frombuffer(floats, dtype=torch.float64).view(-1, count)
        table.view(torch.float64)[:, width:] = values
    table = table.to(rows.device, non_blocking=True)
    return table, table.view(torch.float64)[:, width:]


def program_map(rows: Rows) -> Tensor:
    """int32 [programs, 2]: row and chunk of each program. It is cached: do not write to it."""
    stream = torch.cuda.current_stream(rows.device) if rows.device.type == "cuda" else None
    return _program_map(tuple(rows.sizes), rows.device, stream)


@functools.lru_cache(CACHED_MAPS)
def _program_map(
    sizes: tuple[int, ...], device: torch.device, stream: torch.cuda.Stream | None
) -> Tensor:
    """The cached `program_map`, one per stream: a copy on another stream might not have ended."""
    chunks = torch.tensor([-(-size // CHUNK) for size in sizes])
    starts = torch.tensor([0, *itertools.accumulate(chunks.tolist())][:-1])
    row = torch.arange(len(sizes)).repeat_interleave(chunks)
    mapping = torch.stack([row, torch.arange(len(row)) - starts[row]], 1).int()
    if device.type == "cuda":
        mapping = mapping.pin_memory()
    return mapping.to(device, non_blocking=True)


@triton.jit
def locate(program_map_ptr, table_ptr, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """(row, pointer to the row's entries, size of its tensors, first entry of this program)."""
    pid = tl.program_id(0).to(tl.int64)
    row = tl.load(program_map_ptr + 2 * pid).to(tl.int64)
    start = tl.load(program_map_ptr + 2 * pid + 1).to(tl.int64) * CHUNK
    row_ptr = table_ptr + row * WIDTH
    return row, row_ptr, tl.load(row_ptr), start


@triton.jit
def load_raw_pointer(row_ptr, COLUMN: tl.constexpr):
    """The pointer of a column's tensor as int64; 0 where it is missing."""
    return tl.load(row_ptr + 1 + COLUMN)


@triton.jit
def load_pointer(row_ptr, COLUMN: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The pointer of a column's tensor, typed."""
    pointer = load_raw_pointer(row_ptr, COLUMN).to(tl.pointer_type(DTYPE))
    # the alignment hint must be on the pointer: put on the integer it is lost in the cast, and
    # loads are not vectorised
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def load_scalar(scalars_ptr, row, COLUMN: tl.constexpr, WIDTH: tl.constexpr):
    """One of a row's scalars, float64."""
    return tl.load(scalars_ptr + row * WIDTH + COLUMN)


@triton.jit
def block(first, size, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    """Offsets [BLOCK] from `first` on, and the mask of those within the tensor. WHOLE: all are, and
    the mask is constant, so that the compiler vectorises loads and stores."""
    offs = first + tl.arange(0, BLOCK)
    return offs, tl.full([BLOCK], True, tl.int1) if WHOLE else offs < size


@triton.jit
def where_present(mask, raw_ptr):
    """The mask [BLOCK]; all false where the raw pointer is 0, that is, the tensor is missing."""
    # blocks are compared: the interpreter treats a comparison of scalars as an integer
    return mask & (tl.broadcast_to(raw_ptr, mask.shape) != 0)
