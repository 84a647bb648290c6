"""Nearest neighbours of every sample: within its class by source, and in the whole pool."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# below every cosine: stands for an empty place, and for a sample's similarity to itself
EXCLUDED = -2.0
# samples per side of a block of similarities: 1024 x 1024 float32 are 4 MB.
TILE = 1024


@dataclass(frozen=True)
class NeighborStatistics:
    """Of N samples: top cosines within their class, and their neighbours in the whole pool."""

    real: Tensor  # [N, k], descending cosines to real samples of the class
    synthetic: Tensor  # [N, k], to synthetic ones
    closest: Tensor  # [N, 1], to any
    similarity: Tensor  # [N, K], to the nearest of the whole pool
    index: Tensor  # [N, K], indices of these neighbours


@dataclass(frozen=True)
class NeighborLists:
    """The same while a pool is compared chunk by chunk: EXCLUDED in places still empty."""

    similarity: Tensor  # [N, K], descending; equal ones by ascending index
    index: Tensor  # [N, K], int64
    real: Tensor  # [N, k]
    synthetic: Tensor  # [N, k]

    @classmethod
    def empty(cls, size: int, *, k: int, neighbors: int, like: Tensor) -> NeighborLists:
        """Lists of `size` samples before any pair was seen, of like's dtype and device."""
        return cls(
            like.new_full((size, neighbors), EXCLUDED),
            torch.full((size, neighbors), torch.iinfo(torch.int64).max, device=like.device),
            like.new_full((size, k), EXCLUDED),
            like.new_full((size, k), EXCLUDED),
        )

    def statistics(self) -> NeighborStatistics:
        """The statistics, once every pair was offered. Where a class has fewer than k other
        samples of a source, the missing places repeat the last cosine, or are 0 without any.
        """
        closest = torch.maximum(self.real[:, :1], self.synthetic[:, :1])
        return NeighborStatistics(
            pad_cosines(self.real),
            pad_cosines(self.synthetic),
            pad_cosines(closest),
            self.similarity,
            self.index,
        )


@dataclass(frozen=True)
class NeighborChunk:
    """Samples start, start + 1, ... of a pool."""

    unit: Tensor  # [n, D], rows of length 1, or 0
    labels: Tensor  # [n], int64
    is_synthetic: Tensor  # [n], bool
    start: int

    def part(self, begin: int, end: int) -> NeighborChunk:
        """Samples [begin, end) of the chunk."""
        rows = slice(begin, end)
        return NeighborChunk(
            self.unit[rows], self.labels[rows], self.is_synthetic[rows], self.start + begin
        )

    def split(self, size: int) -> list[NeighborChunk]:
        """Parts of at most `size` samples."""
        return [self.part(b, b + size) for b in range(0, len(self.unit), size)]


def neighbor_statistics(
    unit: Tensor, labels: Tensor, is_synthetic: Tensor, *, k: int = 3, neighbors: int = 5
) -> NeighborStatistics:
    """Statistics of unit rows [N, D] from the full N x N matrix, self excluded: the truth."""
    similarity = unit @ unit.T
    similarity.fill_diagonal_(EXCLUDED)
    same_class = labels[:, None] == labels[None, :]

    def nearest(allowed: Tensor, count: int) -> Tensor:
        candidates = similarity.masked_fill(~allowed, EXCLUDED)
        cosines = candidates.topk(min(count, len(unit)), dim=1).values
        return pad_cosines(F.pad(cosines, (0, count - cosines.shape[1]), value=EXCLUDED))

    return NeighborStatistics(
        nearest(same_class & ~is_synthetic, k),
        nearest(same_class & is_synthetic, k),
        nearest(same_class, 1),
        *top_neighbors(similarity, neighbors),
    )


def neighbor_statistics_(
    lists: NeighborLists, rows: NeighborChunk, columns: NeighborChunk, tile: int | None = None
) -> None:
    """Offer every pair of two chunks, computed once, to the lists of both its samples, in place.

    `rows` and `columns` may be one chunk. Blocks of `tile` samples bound the memory.
    """
    for row_block in rows.split(tile or TILE):
        for block in columns.split(tile or TILE):
            if rows.start == columns.start and block.start < row_block.start:
                continue  # these pairs were seen from the other side
            similarity = row_block.unit @ block.unit.T  # [m, n]
            if block.start == row_block.start:
                similarity.fill_diagonal_(EXCLUDED)
            else:
                _merge(lists, block, row_block, similarity.T)
            _merge(lists, row_block, block, similarity)


def _merge(
    lists: NeighborLists, chunk: NeighborChunk, candidates: NeighborChunk, similarity: Tensor
) -> None:
    """Offer `candidates` at similarity [chunk, candidates] to the lists of `chunk`."""
    rows = slice(chunk.start, chunk.start + len(chunk.unit))
    cosines, index = top_neighbors(similarity, lists.index.shape[1])
    _merge_pool(lists, rows, cosines, index + candidates.start)
    same_class = chunk.labels[:, None] == candidates.labels[None, :]
    for best, chosen in (
        (lists.real, ~candidates.is_synthetic),
        (lists.synthetic, candidates.is_synthetic),
    ):
        allowed = similarity.masked_fill(~(same_class & chosen), EXCLUDED)
        best[rows] = torch.cat([best[rows], allowed], dim=1).topk(best.shape[1], dim=1).values


def _merge_pool(lists: NeighborLists, rows: slice, cosines: Tensor, index: Tensor) -> None:
    """Offer samples `index` at `cosines` [n, *] to the neighbours in the pool."""
    cosines = torch.cat([lists.similarity[rows], cosines], dim=1)
    index = torch.cat([lists.index[rows], index], dim=1)
    # sorted by index first: the stable sort by similarity then leaves ties in that order.
    index, by_index = index.sort(dim=1)
    best, place = top_neighbors(cosines.gather(1, by_index), lists.index.shape[1])
    lists.similarity[rows] = best
    lists.index[rows] = index.gather(1, place)


def merge_lists(lists: NeighborLists, others: NeighborLists, start: int) -> None:
    """Merge other lists of samples start, start + 1, ... into theirs, in place."""
    rows = slice(start, start + len(others.index))
    _merge_pool(lists, rows, others.similarity, others.index)
    for best, more in ((lists.real, others.real), (lists.synthetic, others.synthetic)):
        best[rows] = torch.cat([best[rows], more], dim=1).topk(best.shape[1], dim=1).values


def top_neighbors(similarity: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row [N, M] with their indices, ties to the lowest index."""
    values, index = similarity.sort(dim=1, descending=True, stable=True)
    return values[:, :count], index[:, :count]


def pad_cosines(cosines: Tensor) -> Tensor:
    """[N, k] descending cosines with EXCLUDED in the empty places -> [N, k] without."""
    present = cosines > EXCLUDED
    last = present.sum(1, keepdim=True).clamp(min=1) - 1
    filled = torch.where(present, cosines, cosines.gather(1, last))
    return filled.masked_fill(~present.any(1, keepdim=True), 0.0)
