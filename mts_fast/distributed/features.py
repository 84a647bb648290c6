"""Distribution features of a pool that is spread over ranks.

Each pair of two ranks' samples is compared once: chunks travel round the ring of ranks, and what a
pair has shown of the visitor's samples is sent to their rank. Memory of a rank is that of its own
samples, one visiting chunk, and a few numbers for every sample of the pool.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mts_fast import features
from mts_fast._check import check_finite, check_floating, check_pool
from mts_fast.distributed.candidate_ring import CandidateRing
from mts_fast.distributed.group import Group
from mts_fast.distributed.packing import Layout
from mts_fast.distributed.ranks import Header
from mts_fast.distributed.shard import Shard
from mts_fast.distributed.wrappers import group_of
from mts_fast.features.candidate_index import faiss
from mts_fast.features.columns import Columns, Note
from mts_fast.features.packs import offer_within_packs, packs_of
from mts_fast.features.pool_checks import (
    BAD_ROWS,
    OP,
    check_class_sizes,
    check_distances,
    check_sizes,
)
from mts_fast.features.pool_rows import COMPUTED, PoolRows
from mts_fast.features.recall import LISTS
from mts_fast.features.search import EXACT_NOTE, Approximate, search_options
from mts_fast.features.sweep import CHUNK
from mts_fast.ops.class_centroids import ClassCentroids, class_centroids_
from mts_fast.ops.neighbor_statistics import NeighborChunk, NeighborLists, neighbor_statistics_
from mts_fast.ops.percentile_rank import percentile_rank
from mts_fast.reference.distribution_features import centroid_distances, feature_columns
from mts_fast.reference.label_agreement import label_agreement
from mts_fast.reference.neighbor_statistics import EXCLUDED, merge_lists
from mts_fast.reference.percentile_rank import class_median
from mts_fast.reference.unit_rows import unit_rows

# offers the pairs of two chunks to the lists of both, as neighbor_statistics_ does
Offer = Callable[[NeighborLists, NeighborChunk, NeighborChunk], None]


def distribution_features(
    embeddings: Tensor,
    labels: Tensor,
    is_synthetic: Tensor,
    *,
    k: int = 3,
    neighbors: int = 5,
    small_class: str = "error",
    search: str | Approximate = "exact",
    process_group: Any = "auto",
) -> Columns:
    """`features.distribution_features` of all ranks' joined pool, for the samples of this one.

    Args:
        embeddings, labels, is_synthetic: of this rank's samples [n, D], [n], [n]; the pool is that
            of rank 0, then of rank 1, and so on. A rank may have none.
        k, neighbors, small_class, search: as there, of the joined pool, the same on every rank.
        process_group: "auto", all ranks where torch.distributed is initialised; a group; or None,
            this process alone.

    Returns:
        the columns by name, each [n, width].

    Raises:
        TypeError, ValueError: as there; RuntimeError where another rank has failed, by its number.

    Notes:
        Equal to one process's result on the joined pool but for the rounding of the centroids' sums
        (1e-15 of them). Every rank does an equal part of the N^2 / 2 comparisons where the parts
        have equal sizes, and sends its embeddings R / 2 times.
        An approximate search has an index on every rank, of its own samples: its columns are those
        of another approximate search than one process's. What is equal are the columns that are
        exact there, small classes among them, and what the recall, which is measured over all
        ranks, means. It sends the embeddings R / 2 + R - 1 times.

    Source: docs/algorithm.md, features: distribution group.

    Example:
        >>> import torch
        >>> from mts_fast.distributed import distribution_features
        >>> x, y = torch.randn(40, 8), torch.arange(40) % 2
        >>> columns = distribution_features(x, y, torch.arange(40) % 4 < 2)  # one process here
        >>> columns["real_nearest3_cosine"].shape
        torch.Size([40, 3])
    """
    options: dict[str, Any] = {"k": k, "neighbors": neighbors, "small_class": small_class}
    options["search"] = search
    group = group_of(OP, process_group)
    if group is None:
        return features.distribution_features(embeddings, labels, is_synthetic, **options)
    device = embeddings.device if isinstance(embeddings, Tensor) else torch.device("cpu")
    ranks = Group(OP, group, device, in_band=device.type == "cpu")

    def check() -> tuple[Tensor, Tensor, Tensor]:
        check_floating(OP, "embeddings", embeddings, ndim=2)
        check_finite(OP, "embeddings", embeddings, BAD_ROWS)
        y, flags = check_pool(OP, labels, is_synthetic, len(embeddings))
        if search_options(search) is not None:
            faiss()  # a rank without it tells the others
        x = embeddings.detach()
        return x if x.dtype in COMPUTED else x.float(), y, flags

    def header(checked: tuple[Tensor, Tensor, Tensor]) -> Header:
        x = checked[0]
        same = {"the options": options, "the width and dtype of embeddings": (x.shape[1], x.dtype)}
        return Header((len(x),), same)

    (x, y, flags), opened = ranks.open(check, header)
    return _Pool(ranks, opened.shards[0], x, y, flags).columns(**options)


@dataclass(frozen=True)
class _Pool:
    """One rank's part of a pool."""

    ranks: Group
    shard: Shard
    x: Tensor  # [n, D]
    labels: Tensor  # [n]
    is_synthetic: Tensor  # [n]

    def columns(
        self, *, k: int, neighbors: int, small_class: str, search: str | Approximate
    ) -> Columns:
        """The features of the samples here."""
        check_sizes(self.shard.total, k, neighbors, small_class)
        labels, flags = self.ranks.rows(
            "labels and sources", self.shard, lambda: [self.labels, self.is_synthetic]
        )
        names, labels = labels.unique(return_inverse=True)  # numbered alike on every rank
        if small_class == "error":
            check_class_sizes(labels, flags, names, k)
        here = self.shard.mine(labels)
        centroids = self._centroids(labels, flags, len(names))

        def distances() -> list[Tensor]:
            cosines, distance = centroid_distances(self.x, here, centroids)
            check_distances(distance)
            return [cosines, distance]

        cosines, distance = self.ranks.rows("distances", self.shard, distances)
        gap = (distance - class_median(distance, labels)).abs()
        rank = self.shard.mine(percentile_rank(gap, labels)).to(cosines.dtype)
        lists = NeighborLists.empty(len(self.x), k=k, neighbors=neighbors, like=self.x)
        notes = self._fill(lists, labels, search_options(search))
        nearest = lists.statistics()
        agreement = label_agreement(nearest.similarity, nearest.index, here, pool_labels=labels)
        columns = feature_columns(nearest, agreement, self.shard.mine(cosines), rank)
        return Columns(columns, notes)

    def _fill(
        self, lists: NeighborLists, labels: Tensor, options: Approximate | None
    ) -> dict[str, Note]:
        """Fill the lists of the samples here; notes on an approximate search. labels [N]."""
        here = self.shard.mine(labels)
        mine = NeighborChunk(unit_rows(self.x), here, self.is_synthetic, 0)
        if options is None or self.shard.total < options.exact_below:
            self._compare(mine, lists, neighbor_statistics_)
            return {} if options is None else {name: EXACT_NOTE for name in LISTS}
        packs = packs_of(labels, int(labels.max()) + 1, options.exact_below, CHUNK)
        self._compare(mine, lists, partial(offer_within_packs, packs=packs))
        rows = PoolRows(self.x, here, self.is_synthetic, CHUNK)
        sizes = {"k": lists.real.shape[1], "neighbors": lists.index.shape[1]}
        ring = CandidateRing(self.ranks, self.shard, rows, packs, options, **sizes)
        ring.search(mine, lists, self._passed_on)
        return ring.notes(lists, labels)

    def _centroids(self, labels: Tensor, flags: Tensor, classes: int) -> ClassCentroids:
        """Of the whole pool."""
        total = ClassCentroids.empty(classes, self.x.shape[1], self.x.device)

        def sums() -> tuple[list[Tensor | None], list[Tensor]]:
            mine = ClassCentroids.empty(classes, self.x.shape[1], self.x.device)
            class_centroids_(mine, self.x, self.shard.mine(labels), self.is_synthetic)
            return [mine.sums], []

        summed = self.ranks.summed("sums of classes", [total.sums], 0, sums)[0][0]
        counts = torch.bincount(labels + classes * flags, minlength=2 * classes).view(2, classes)
        return ClassCentroids(total.sums if summed is None else summed, counts)

    def _compare(self, mine: NeighborChunk, lists: NeighborLists, offer: Offer) -> None:
        """Offer every pair of the pool with a sample here to the lists of the samples here."""
        if len(mine.unit):
            offer(lists, mine, mine)
        _renumber(lists, self._first(self.ranks.index))
        size, index = self.ranks.size, self.ranks.index
        layout = Layout.of(list(vars(lists).values()))
        visitor = mine
        for offset in range(1, size // 2 + 1):
            other, back = (index + offset) % size, (index - offset) % size
            visitor = self._passed_on(visitor, other)
            rows, columns, returned = mine, visitor, mine
            if 2 * offset == size:
                # across the ring two ranks meet twice: each takes half of the lower one's samples
                half = len(visitor.unit if other < index else mine.unit) // 2
                if index < other:
                    rows, returned = mine.part(0, half), mine.part(half, len(mine.unit))
                else:
                    columns = visitor.part(half, len(visitor.unit))
            of_rows, of_columns = self._pair(rows, columns, other, lists, offer)
            merge_lists(lists, of_rows, rows.start)
            sent = layout.packed(list(vars(of_columns).values()), self.x.device)
            got = self.ranks.swapped(sent, other, back, len(returned.unit))
            merge_lists(lists, NeighborLists(*layout.unpacked(got)), returned.start)

    def _first(self, rank: int) -> int:
        """The number of a rank's first sample in the pool."""
        return sum(self.shard.sizes[:rank])

    def _passed_on(self, visitor: NeighborChunk, other: int) -> NeighborChunk:
        """The samples of rank `other`, from the next rank; the visitor goes on to the last one."""
        size, index = self.ranks.size, self.ranks.index
        parts = [visitor.unit, visitor.labels, visitor.is_synthetic]
        layout = Layout.of(parts)
        sent = layout.packed(parts, self.x.device)
        before, after = (index - 1) % size, (index + 1) % size
        got = self.ranks.swapped(sent, before, after, self.shard.sizes[other])
        unit, labels, flags = layout.unpacked(got)
        return NeighborChunk(unit, labels, flags, 0)

    def _pair(
        self,
        rows: NeighborChunk,
        columns: NeighborChunk,
        other: int,
        like: NeighborLists,
        offer: Offer,
    ) -> tuple[NeighborLists, NeighborLists]:
        """What samples here and of another rank are to each other: lists of both, by numbers of
        the pool. Ties go to the lower one, so the lower rank's samples come first."""
        here_first = self.ranks.index < other
        first, second = (rows, columns) if here_first else (columns, rows)
        ranks = (self.ranks.index, other) if here_first else (other, self.ranks.index)
        size = len(first.unit)
        both = NeighborLists.empty(
            size + len(second.unit),
            k=like.real.shape[1],
            neighbors=like.index.shape[1],
            like=self.x,
        )
        starts = [self._first(r) + c.start for r, c in zip(ranks, (first, second), strict=True)]
        offer(both, replace(first, start=0), replace(second, start=size))
        halves = [
            NeighborLists(*(t[part] for t in vars(both).values()))
            for part in (slice(0, size), slice(size, None))
        ]
        # the first's lists hold samples of the second, and the other way round
        _renumber(halves[0], starts[1] - size)
        _renumber(halves[1], starts[0])
        return (halves[0], halves[1]) if here_first else (halves[1], halves[0])


def _renumber(lists: NeighborLists, offset: int) -> None:
    """Add to the numbers of neighbours, in place; places still empty stay so."""
    lists.index.add_(offset * (lists.similarity > EXCLUDED))
