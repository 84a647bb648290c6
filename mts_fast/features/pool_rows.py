"""The rows of a pool's embeddings, read chunk by chunk or by their numbers."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from mts_fast._check import check_finite, check_floating, fail
from mts_fast.features.pool_checks import BAD_ROWS, OP
from mts_fast.reference.neighbor_statistics import NeighborChunk
from mts_fast.reference.unit_rows import unit_rows

# dtypes that chunks are compared in; half precision is converted
COMPUTED = (torch.float32, torch.float64)


class EmbeddingSource(Protocol):
    """Embeddings [N, D] that are read a slice of rows at a time: a tensor, or a file.

    A source that also has `rows(numbers)`, for numbers [n] int64 in any order, is searched faster.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, rows: slice) -> Tensor: ...


class PoolRows:
    """Embeddings of N samples with their classes and sources, in chunks.

    Args:
        source: [N, D], floating point.
        labels: [N] int64, numbered from 0 without gaps.
        is_synthetic: [N] bool.
        chunk: rows read at once.
    """

    def __init__(
        self, source: EmbeddingSource | Tensor, labels: Tensor, is_synthetic: Tensor, chunk: int
    ) -> None:
        self.source, self.labels, self.is_synthetic = source, labels, is_synthetic
        self.chunk = chunk
        self.size, self.dimension = source.shape
        self.starts = range(0, self.size, chunk)

    def slice(self, index: int) -> slice:
        """The numbers of chunk `index`."""
        start = self.starts[index]
        return slice(start, min(start + self.chunk, self.size))

    def read(self, index: int) -> Tensor:
        """Chunk `index` [n, D], checked, in a dtype that is computed in."""
        rows = self.slice(index)
        part = check_floating(OP, "embeddings", self.source[rows], ndim=2).detach()
        shape = (rows.stop - rows.start, self.dimension)
        if part.shape != shape:
            expected = f"of shape {shape} in rows {rows.start} to {rows.stop - 1}"
            fail(ValueError, OP, "embeddings", expected, tuple(part.shape), "mend the source")
        check_finite(OP, "embeddings", part, BAD_ROWS, first=rows.start)
        return part if part.dtype in COMPUTED else part.float()

    def unit_chunk(self, index: int) -> NeighborChunk:
        """Chunk `index` with rows of unit length."""
        rows = self.slice(index)
        unit = unit_rows(self.read(index))
        return NeighborChunk(unit, self.labels[rows], self.is_synthetic[rows], rows.start)

    def unit_at(self, numbers: Tensor) -> Tensor:
        """Rows of unit length [n, D] of samples `numbers` [n], in any order."""
        return unit_rows(self.at(numbers))

    def at(self, numbers: Tensor) -> Tensor:
        """Samples `numbers` [n, D], in any order, in a dtype that is computed in."""
        part = rows_at(self.source, numbers).detach()
        return part if part.dtype in COMPUTED else part.float()

    def chunk_at(self, numbers: Tensor, start: int = 0) -> NeighborChunk:
        """Samples `numbers` [n] as a chunk that begins at `start`."""
        return NeighborChunk(
            self.unit_at(numbers), self.labels[numbers], self.is_synthetic[numbers], start
        )


def rows_at(source: Any, numbers: Tensor) -> Tensor:
    """Rows `numbers` [n] of a source [N, D]; of one with slices alone, by runs of numbers."""
    if isinstance(source, Tensor):
        return source[numbers]
    if hasattr(source, "rows"):
        return source.rows(numbers)
    distinct, place = numbers.unique(return_inverse=True)
    breaks = (distinct.diff() > 1).nonzero().flatten() + 1
    runs = distinct.tensor_split(breaks.cpu())
    parts = [source[slice(int(run[0]), int(run[-1]) + 1)] for run in runs if len(run)]
    joined = torch.cat(parts) if parts else source[slice(0, 0)]
    return joined[place]
