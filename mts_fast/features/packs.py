"""Small classes, compared exactly: some of them together in a pack."""

from __future__ import annotations

import torch
from torch import Tensor

from mts_fast.ops.neighbor_statistics import NeighborChunk, NeighborLists, neighbor_statistics_
from mts_fast.reference.neighbor_statistics import EXCLUDED, top_neighbors

NO_PACK = -1


def packs_of(labels: Tensor, classes: int, exact_below: int, size: int) -> Tensor:
    """The pack [C] of each class, NO_PACK where it has `exact_below` samples or more.

    Consecutive classes share a pack of at most `size` samples; a larger class has its own.
    """
    packs, pack, filled = [], -1, size
    for count in torch.bincount(labels, minlength=classes).tolist():
        if count >= exact_below:
            packs.append(NO_PACK)
            continue
        if filled + count > size:
            pack, filled = pack + 1, 0
        filled += count
        packs.append(pack)
    return torch.tensor(packs, dtype=torch.int64, device=labels.device)


def offer_within_packs(
    lists: NeighborLists, rows: NeighborChunk, columns: NeighborChunk, *, packs: Tensor
) -> None:
    """Offer the pairs of two chunks whose classes are of one pack [C] to the lists of both their
    samples, in place. The chunks may be one; lists of samples of a pack are empty before."""
    of_rows, of_columns = packs[rows.labels], packs[columns.labels]
    same = rows.start == columns.start
    for pack in sorted({*of_rows.unique().tolist()} & {*of_columns.unique().tolist()} - {NO_PACK}):
        first = (of_rows == pack).nonzero().flatten()
        second = (of_columns == pack).nonzero().flatten()
        numbers = first + rows.start
        if not same:
            numbers = torch.cat([numbers, second + columns.start])
        part = NeighborLists.empty(
            len(numbers),
            k=lists.real.shape[1],
            neighbors=lists.index.shape[1],
            like=lists.similarity,
        )
        chosen = _chosen(rows, first, 0)
        other = chosen if same else _chosen(columns, second, len(first))
        neighbor_statistics_(part, chosen, other)
        place = renumbered(part, numbers)
        for mine, new in zip(vars(lists).values(), vars(place).values(), strict=True):
            mine[numbers] = new


def renumbered(lists: NeighborLists, numbers: Tensor) -> NeighborLists:
    """Lists whose neighbours are places in `numbers` [n], by those numbers."""
    empty = lists.similarity == EXCLUDED
    index = numbers[lists.index.masked_fill(empty, 0)].masked_fill(
        empty, torch.iinfo(torch.int64).max
    )
    return NeighborLists(lists.similarity, index, lists.real, lists.synthetic)


def merge_distinct(lists: NeighborLists, numbers: Tensor, others: NeighborLists) -> None:
    """Merge others' lists of samples `numbers` [n] into theirs, in place. The same neighbour may be
    in both lists of the pool; those within the class must have none in common."""
    index = torch.cat([lists.index[numbers], others.index], 1)
    cosines = torch.cat([lists.similarity[numbers], others.similarity], 1)
    index, by_index = index.sort(dim=1, stable=True)
    cosines = cosines.gather(1, by_index)
    cosines[:, 1:].masked_fill_(index[:, 1:] == index[:, :-1], EXCLUDED)
    best, place = top_neighbors(cosines, lists.index.shape[1])
    lists.similarity[numbers], lists.index[numbers] = best, index.gather(1, place)
    for mine, more in ((lists.real, others.real), (lists.synthetic, others.synthetic)):
        mine[numbers] = torch.cat([mine[numbers], more], 1).topk(mine.shape[1], dim=1).values


def _chosen(chunk: NeighborChunk, rows: Tensor, start: int) -> NeighborChunk:
    """Some rows of a chunk, as samples from `start` on."""
    return NeighborChunk(chunk.unit[rows], chunk.labels[rows], chunk.is_synthetic[rows], start)
