"""Approximate search of a pool that is spread over ranks.

Each rank has an index of its own samples, with a codebook of its own. The samples of every rank go
round the ring and ask each index; the answers go to their rank and are merged there. A sample of
the pool, which all ranks share, is compared with everything: by it each rank chooses how thoroughly
its lists are looked through, and the recall is measured over all ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mts_fast.distributed.group import Group
from mts_fast.distributed.packing import Layout
from mts_fast.distributed.shard import Shard
from mts_fast.features.candidate_index import NOBODY
from mts_fast.features.candidate_search import CandidateSearch, Queries
from mts_fast.features.columns import Note
from mts_fast.features.packs import NO_PACK, merge_distinct
from mts_fast.features.pool_rows import PoolRows
from mts_fast.features.recall import drawn_queries, exact_lists, search_notes, warn_of
from mts_fast.features.search import Approximate
from mts_fast.ops.neighbor_statistics import NeighborChunk, NeighborLists
from mts_fast.reference.neighbor_statistics import EXCLUDED, merge_lists

# visitor, rank -> the samples of that rank
PassedOn = Callable[[NeighborChunk, int], NeighborChunk]


class CandidateRing:
    """One rank's part of the search.

    Args:
        ranks: all of them.
        shard: which samples of the pool are here.
        rows: these samples, of classes numbered alike on every rank.
        packs: [C], of small classes, which are not searched.
        options: of the search.
        k, neighbors: lengths of the lists.
    """

    def __init__(
        self,
        ranks: Group,
        shard: Shard,
        rows: PoolRows,
        packs: Tensor,
        options: Approximate,
        *,
        k: int,
        neighbors: int,
    ) -> None:
        self.ranks, self.shard, self.rows, self.options = ranks, shard, rows, options
        self.sizes: dict[str, Any] = {"k": k, "neighbors": neighbors}
        self._large = packs == NO_PACK
        self._first = sum(shard.sizes[: ranks.index])
        self._draw()

    def search(self, mine: NeighborChunk, lists: NeighborLists, passed_on: PassedOn) -> None:
        """Merge what every rank's index has for the samples here into their lists."""
        exact = self.ranks.together(self._exact_here)
        search = self.ranks.together(lambda: self._built(exact))
        self._gather_exact(exact)
        self._gather_settings(search)
        size, index = self.ranks.size, self.ranks.index
        everyone = torch.arange(len(mine.unit), device=mine.unit.device)
        layout = Layout.of(list(vars(lists).values()))
        visitor = mine
        for offset in range(size):
            other, back = (index + offset) % size, (index - offset) % size
            numbers = everyone
            if offset:
                visitor = passed_on(visitor, other)
                numbers = everyone.new_full((len(visitor.unit),), NOBODY)
            ask = partial(self._answers, search, Queries(visitor, numbers))
            answers = self.ranks.together(ask)
            if offset:
                sent = layout.packed(list(vars(answers).values()), mine.unit.device)
                got = self.ranks.swapped(sent, other, back, len(mine.unit))
                answers = NeighborLists(*layout.unpacked(got))
            merge_distinct(lists, everyone, answers)

    def notes(self, lists: NeighborLists, labels: Tensor) -> dict[str, Note]:
        """Recall and errors over all ranks, by column, from the finished lists of the samples here;
        labels [N] of the pool."""
        here = self._chosen
        gathered = self.ranks.rows(
            "neighbours of the sample",
            self._sample,
            lambda: [t[here] for t in vars(lists).values()],
        )
        # every rank has chosen its setting by the other half
        half = slice(1, None, 2)
        approximate, exact = (
            NeighborLists(*(t[half] for t in each))
            for each in (gathered, vars(self._exact).values())
        )
        notes = search_notes(
            approximate, exact, self._queries.chunk.labels[half], labels, self._description
        )
        if self.ranks.index == 0:
            warn_of(notes, self.options.recall)
        return notes

    def _draw(self) -> None:
        """The sample of all ranks' samples, each rank's share as large as its part."""
        total, index = self.shard.total, self.ranks.index
        shares = [min(n, -(-self.options.queries * n // total)) for n in self.shard.sizes]
        self._sample = Shard(tuple(shares), index)
        seed = self.options.seed + index
        self._chosen = drawn_queries(self.rows.size, shares[index], seed).to(
            self.rows.labels.device
        )

        def parts() -> list[Tensor]:
            chunk = self.rows.chunk_at(self._chosen)
            return [chunk.unit, chunk.labels, chunk.is_synthetic, self._chosen + self._first]

        unit, labels, flags, numbers = self.ranks.rows("sample", self._sample, parts)
        inside = (numbers >= self._first) & (numbers < self._first + self.rows.size)
        numbers = (numbers - self._first).masked_fill(~inside, NOBODY)
        self._queries = Queries(NeighborChunk(unit, labels, flags, 0), numbers)

    def _exact_here(self) -> NeighborLists:
        """The sample's neighbours among the samples here, by their numbers here."""
        return exact_lists(self.rows, self._queries.chunk, self._queries.numbers, **self.sizes)

    def _gather_exact(self, here: NeighborLists) -> None:
        """The sample's neighbours in the pool."""
        here = self._renumbered(here)
        count, size = len(here.index), self.ranks.size
        every = Shard((count,) * size, self.ranks.index)
        gathered = self.ranks.rows("exact neighbours", every, lambda: list(vars(here).values()))
        first, *others = zip(*(t.split(count) for t in gathered), strict=True)
        self._exact = NeighborLists(*(t.clone() for t in first))
        for part in others:
            merge_lists(self._exact, NeighborLists(*part), 0)

    def _gather_settings(self, search: CandidateSearch | None) -> None:
        """What the ranks have chosen, in words."""
        mine = torch.tensor([[0, 0]])
        if search is not None:
            mine = torch.tensor([[search.setting.nprobe, search.setting.candidates]])
        every = Shard((1,) * self.ranks.size, self.ranks.index)
        (settings,) = self.ranks.rows("settings", every, lambda: [mine])
        (nprobe, candidates) = settings.amax(0).tolist()
        self._description = (
            f"approximate on {self.ranks.size} ranks, nprobe {nprobe}, candidates {candidates} at"
            " most"
        )

    def _built(self, exact: NeighborLists) -> CandidateSearch | None:
        """The index of the samples here; None where there are none."""
        if not self.rows.size:
            return None
        search = CandidateSearch(self.rows, self._large, self.options, **self.sizes)
        half = NeighborLists(*(t[::2] for t in vars(exact).values()))
        search.fit(self._queries.every_second(0), half)
        return search

    def _answers(self, search: CandidateSearch | None, queries: Queries) -> NeighborLists:
        """What the index here has for some samples, by numbers of the pool."""
        chunks = queries.chunk.split(self.rows.chunk)
        if search is None or not chunks:
            return NeighborLists.empty(len(queries.numbers), **self.sizes, like=queries.chunk.unit)
        parts = [
            vars(search.search(Queries(chunk, numbers))).values()
            for chunk, numbers in zip(chunks, queries.numbers.split(self.rows.chunk), strict=True)
        ]
        return self._renumbered(NeighborLists(*map(torch.cat, zip(*parts, strict=True))))

    def _renumbered(self, lists: NeighborLists) -> NeighborLists:
        """Lists by numbers of the pool in place of those here."""
        index = lists.index + self._first * (lists.similarity > EXCLUDED)
        return NeighborLists(lists.similarity, index, lists.real, lists.synthetic)
