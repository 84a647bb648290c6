"""neighbor_statistics by the C++ and CUDA kernels: schemas, sorted chunks, the tiles of a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mts_fast.backends.cpp.class_numbers import table_numbers
from mts_fast.reference.neighbor_statistics import NeighborChunk, NeighborLists

# rows and columns of a tile on a GPU: 256 MB of float32 keep cuBLAS and the merge busy.
CUDA_TILE = 8192

torch.library.define(
    "mts_fast::neighbor_statistics_",
    "(Tensor rows, Tensor row_order, Tensor row_offsets, int row_start,"
    " Tensor columns, Tensor column_order, Tensor column_offsets, int column_start,"
    " Tensor(a!) similarity, Tensor(b!) index, Tensor(c!) real, Tensor(d!) synthetic, int tile)"
    " -> ()",
)


@torch.library.register_fake("mts_fast::neighbor_statistics_")
def _fake(*_: Tensor | int) -> None:
    """Writes to its lists and returns nothing."""


# the op of a GPU: merges one tile of similarities, computed by cuBLAS.
torch.library.define(
    "mts_fast::merge_neighbors_",
    "(Tensor tile, Tensor row_sample, Tensor row_class, Tensor column_sample,"
    " Tensor column_offsets, int first_column, Tensor(a!) similarity, Tensor(b!) index,"
    " Tensor(c!) real, Tensor(d!) synthetic) -> ()",
)


@torch.library.register_fake("mts_fast::merge_neighbors_")
def _fake_merge(*_: Tensor | int) -> None:
    """Writes to its lists and returns nothing."""


def _sort_by_group(chunk: NeighborChunk, num_classes: int) -> tuple[Tensor, Tensor]:
    """(order [n], offsets [2 C + 1]): samples sorted by class, real before synthetic, and the start
    of each group."""
    group = 2 * chunk.labels + chunk.is_synthetic
    counts = torch.bincount(group, minlength=2 * num_classes)
    return group.argsort(stable=True), F.pad(counts.cumsum(0), (1, 0))


def neighbor_statistics_(
    lists: NeighborLists, rows: NeighborChunk, columns: NeighborChunk, tile: int | None
) -> None:
    if rows.unit.is_cuda:
        merge_tiles(torch.ops.mts_fast.merge_neighbors_, lists, rows, columns, tile or CUDA_TILE)
        return
    rows, columns, num_classes = _renumber(rows, columns)
    torch.ops.mts_fast.neighbor_statistics_(
        *(rows.unit, *_sort_by_group(rows, num_classes), rows.start),
        *(columns.unit, *_sort_by_group(columns, num_classes), columns.start),
        *(lists.similarity, lists.index, lists.real, lists.synthetic),
        tile or 0,
    )


def _renumber(
    rows: NeighborChunk, columns: NeighborChunk
) -> tuple[NeighborChunk, NeighborChunk, int]:
    """The chunks with classes renumbered to [0, C), and C."""
    labels, num_classes = table_numbers(torch.cat([rows.labels, columns.labels]))
    parts = labels.split([len(rows.labels), len(columns.labels)])
    return replace(rows, labels=parts[0]), replace(columns, labels=parts[1]), num_classes


def merge_tiles(
    merge: Callable[..., None],
    lists: NeighborLists,
    rows: NeighborChunk,
    columns: NeighborChunk,
    tile: int,
) -> None:
    """The sweep of a GPU: tiles by matrix product in torch's float32 precision, each merged into
    the lists of its rows and, transposed, into those of its columns."""
    rows, columns, num_classes = _renumber(rows, columns)
    # per chunk: unit rows, rows of the lists, classes, offsets; index 0 the rows, 1 the columns
    sorted_chunks = []
    for chunk in (rows, columns):
        order, offsets = _sort_by_group(chunk, num_classes)
        sorted_chunks.append((chunk.unit[order], order + chunk.start, chunk.labels[order], offsets))
    list_tensors = (lists.similarity, lists.index, lists.real, lists.synthetic)

    def merge_tile(similarity: Tensor, row_chunk: int, r: int, column_chunk: int, c: int) -> None:
        _, row_samples, row_labels, _ = sorted_chunks[row_chunk]
        _, column_samples, _, offsets = sorted_chunks[column_chunk]
        height, width = similarity.shape
        merge(
            similarity,
            row_samples[r : r + height],
            row_labels[r : r + height],
            column_samples[c : c + width],
            offsets,
            c,
            *list_tensors,
        )

    row_unit, column_unit = sorted_chunks[0][0], sorted_chunks[1][0]
    for r in range(0, len(rows.unit), tile):
        first = r if rows.start == columns.start else 0
        for c in range(first, len(columns.unit), tile):
            similarity = row_unit[r : r + tile] @ column_unit[c : c + tile].T
            merge_tile(similarity, 0, r, 1, c)
            if rows.start != columns.start or r != c:
                merge_tile(similarity.T.contiguous(), 1, c, 0, r)
