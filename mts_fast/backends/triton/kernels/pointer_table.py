"""One launch over many tensors: a table of their pointers and scalars, and a map of programs.

A row of the table belongs to one parameter and holds its size, the pointers of its tensors
(parameter, gradient, ...; 0 for a missing one) and its scalars. The map gives each program a row
and a chunk of CHUNK entries.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mts_fast._check import fail

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


def kind_of(columns: Sequence[Tensor | None]) -> Kind:
    """Launch key of one row. A missing tensor takes the first column's dtype, so that it does not
    split the launch."""
    first = columns[0]
    assert first is not None
    return Kind(
        tuple(first.dtype if t is None else t.dtype for t in columns),
        all(raw_pointer(t) % ACCESS_BYTES == 0 for t in columns),
    )


def raw_pointer(tensor: Tensor | None) -> int:
    """The pointer to its first entry as an integer; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def pointer_table(
    rows: Sequence[Sequence[Tensor | None]], scalars: Iterable[Sequence[float]] = ()
) -> tuple[Tensor, Tensor]:
    """(table, scalars): int64 [T, 1 + columns + N] with size, pointers and scalars of each row, and
    a float64 view [T, N] of its last N columns. No tensor may be empty. One copy to the device, and
    the host does not wait for it.
    """
    first = rows[0][0]
    assert first is not None
    device = first.device
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # the graph would hold the address of pinned memory that others use at its replay
        hint = "capture with use_backend('reference'), or keep this call out of the graph"
        expected = "outside of a CUDA graph's capture"
        fail(RuntimeError, "pointer_table", "the call", expected, "one inside", hint)
    integers = [[row[0].numel(), *map(raw_pointer, row)] for row in rows if row[0] is not None]
    floats = torch.tensor(list(scalars), dtype=torch.float64).view(len(rows), -1)
    width = len(integers[0])
    shape = (len(rows), width + floats.shape[1])
    # the allocator reuses pinned memory only after the copy has ended
    table = torch.empty(shape, dtype=torch.int64, pin_memory=device.type == "cuda")
    table[:, :width] = torch.tensor(integers)
    table.view(torch.float64)[:, width:] = floats
    table = table.to(device, non_blocking=True)
    return table, table.view(torch.float64)[:, width:]


def program_map(rows: Sequence[Sequence[Tensor | None]]) -> Tensor:
    """int32 [programs, 2]: row and chunk of each program. It is cached: do not write to it."""
    sizes = tuple(row[0].numel() for row in rows if row[0] is not None)
    first = rows[0][0]
    assert first is not None
    stream = torch.cuda.current_stream(first.device) if first.is_cuda else None
    return _program_map(sizes, first.device, stream)


@functools.lru_cache(CACHED_MAPS)
def _program_map(
    sizes: tuple[int, ...], device: torch.device, stream: torch.cuda.Stream | None
) -> Tensor:
    """The cached `program_map`, one per stream: a copy on another stream might not have ended."""
    chunks = torch.tensor([triton.cdiv(size, CHUNK) for size in sizes])
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
