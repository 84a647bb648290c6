"""Many tensors in one launch: a table of their addresses and numbers, and who works where.

A launch takes a list of rows, one a tensor: its size, the addresses of what lies beside it (0 where
there is nothing), and its own numbers. Programs are dealt out by chunks of CHUNK entries.
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

# 2048 entries of 8 warps are 8 a thread: one 16-byte access of 16-bit numbers, two of float32.
BLOCK = 2048
# a program looks its tensor up once for so many blocks
BLOCKS = 4
CHUNK = BLOCK * BLOCKS
WARPS = 8
# of the widest access of a thread
ACCESS_BYTES = 16
# a step has a handful of groups of tensors; several models may take turns
CACHED_PLACES = 64


class Kind(NamedTuple):
    """What tensors of one launch have in common."""

    dtypes: tuple[torch.dtype, ...]  # of each column of the table
    aligned: bool  # every address is a multiple of ACCESS_BYTES


def kind_of(columns: Sequence[Tensor | None]) -> Kind:
    """The kind of one row; what is absent counts as the first, so that it makes no other launch."""
    first = columns[0]
    assert first is not None
    return Kind(
        tuple(first.dtype if t is None else t.dtype for t in columns),
        all(address_of(t) % ACCESS_BYTES == 0 for t in columns),
    )


def address_of(tensor: Tensor | None) -> int:
    """Where it starts; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def pointer_table(
    rows: Sequence[Sequence[Tensor | None]], numbers: Iterable[Sequence[float]] = ()
) -> tuple[Tensor, Tensor]:
    """(int64 [T, 1 + columns + N], its last N columns as float64): size, addresses, numbers of each
    row, of which no tensor is empty. One copy to the device, which nothing waits for.
    """
    first = rows[0][0]
    assert first is not None
    device = first.device
    wholes = [[row[0].numel(), *map(address_of, row)] for row in rows if row[0] is not None]
    floats = torch.tensor(list(numbers), dtype=torch.float64).view(len(rows), -1)
    width = len(wholes[0])
    shape = (len(rows), width + floats.shape[1])
    # pinned memory is given back to its allocator only after the copy
    table = torch.empty(shape, dtype=torch.int64, pin_memory=device.type == "cuda")
    table[:, :width] = torch.tensor(wholes)
    table.view(torch.float64)[:, width:] = floats
    table = table.to(device, non_blocking=True)
    return table, table.view(torch.float64)[:, width:]


def places(rows: Sequence[Sequence[Tensor | None]]) -> Tensor:
    """int32 [programs, 2]: the row and the chunk of each program. Not to be written to."""
    sizes = tuple(row[0].numel() for row in rows if row[0] is not None)
    first = rows[0][0]
    assert first is not None
    stream = torch.cuda.current_stream(first.device) if first.is_cuda else None
    return _places(sizes, first.device, stream)


@functools.lru_cache(CACHED_PLACES)
def _places(
    sizes: tuple[int, ...], device: torch.device, stream: torch.cuda.Stream | None
) -> Tensor:
    """One for each stream: on another one the copy might not have arrived yet."""
    chunks = torch.tensor([triton.cdiv(size, CHUNK) for size in sizes])
    starts = torch.tensor([0, *itertools.accumulate(chunks.tolist())][:-1])
    row = torch.arange(len(sizes)).repeat_interleave(chunks)
    found = torch.stack([row, torch.arange(len(row)) - starts[row]], 1).int()
    if device.type == "cuda":
        found = found.pin_memory()
    return found.to(device, non_blocking=True)


@triton.jit
def place(places_ptr, table_ptr, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """The row of this program's tensor, its entries in the table, its size, and where to start."""
    pid = tl.program_id(0).to(tl.int64)
    row = tl.load(places_ptr + 2 * pid).to(tl.int64)
    start = tl.load(places_ptr + 2 * pid + 1).to(tl.int64) * CHUNK
    row_ptr = table_ptr + row * WIDTH
    return row, row_ptr, tl.load(row_ptr), start


@triton.jit
def address(row_ptr, COLUMN: tl.constexpr):
    """Where the tensor of a column starts; 0 for none."""
    return tl.load(row_ptr + 1 + COLUMN)


@triton.jit
def pointer(row_ptr, COLUMN: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The same as a pointer."""
    found = address(row_ptr, COLUMN).to(tl.pointer_type(DTYPE))
    # said of the pointer: of the address before the cast the compiler forgets it, and reads entry
    # by entry
    return tl.multiple_of(found, 16) if ALIGNED else found


@triton.jit
def block(first, size, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    """Offsets [BLOCK] from `first`, and which are of the tensor. A mask that the compiler can see
    to be all true leaves accesses wide."""
    offs = first + tl.arange(0, BLOCK)
    return offs, tl.full([BLOCK], True, tl.int1) if WHOLE else offs < size


@triton.jit
def where_present(mask, address):
    """The mask [BLOCK]; all false where the address is 0."""
    # compared as a block: the interpreter takes a comparison of scalars for an integer
    return mask & (tl.broadcast_to(address, mask.shape) != 0)
