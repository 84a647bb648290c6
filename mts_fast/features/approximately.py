"""Approximate search of a pool: inverted lists for the pool and its large classes, exact comparison
within its small ones."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from mts_fast._check import fail
from mts_fast.features.candidate_index import faiss
from mts_fast.features.candidate_search import CandidateSearch, Queries, Setting
from mts_fast.features.columns import Note
from mts_fast.features.packs import NO_PACK, merge_distinct, packs_of, renumbered
from mts_fast.features.pool_checks import OP
from mts_fast.features.pool_rows import PoolRows
from mts_fast.features.recall import drawn_queries, exact_lists, search_notes, warn_of
from mts_fast.features.search import Approximate
from mts_fast.ops.neighbor_statistics import NeighborLists, neighbor_statistics_


class Approximately:
    """Fills a pool's lists: a unit of work for the sample of queries, one for each chunk that is
    searched, one for each pack of small classes.

    An index is built before the first chunk is searched, and again by a process that resumes; it
    is the same one.
    """

    def __init__(
        self, rows: PoolRows, lists: NeighborLists, options: Approximate, *, k: int, neighbors: int
    ) -> None:
        faiss()  # a missing package is told before the work
        self.rows, self.lists, self.options = rows, lists, options
        self.sizes = {"k": k, "neighbors": neighbors}
        classes = int(rows.labels.max()) + 1
        self._packs = packs_of(rows.labels, classes, options.exact_below, rows.chunk)
        like = lists.similarity
        self._numbers = drawn_queries(rows.size, options.queries, options.seed).to(like.device)
        self._exact = NeighborLists.empty(len(self._numbers), **self.sizes, like=like)
        # nprobe and candidates, 0 before the fit, and what the options are
        self._setting = torch.tensor([0, 0, _digest(options)])
        self._search: CandidateSearch | None = None

    @property
    def total(self) -> int:
        """How many units there are."""
        return 1 + len(self.rows.starts) + self._count_of_packs

    def units(self) -> list[Callable[[], None]]:
        """The work, in order; the index is built anew."""
        self._search = None
        return [
            self._compare_sample,
            *(partial(self._search_chunk, index) for index in range(len(self.rows.starts))),
            *(partial(self._compare_pack, pack) for pack in range(self._count_of_packs)),
        ]

    def release(self) -> None:
        """Drop the index."""
        self._search = None

    def state(self) -> dict[str, Tensor]:
        """What the sample has shown."""
        lists = {f"sample/{name}": value for name, value in vars(self._exact).items()}
        return {**lists, "setting": self._setting}

    def check_state(self, state: Mapping[str, Tensor]) -> None:
        """Refuse a state that no search can have left."""
        *setting, digest = state["setting"].tolist()
        if min(setting) < 0:
            fail(ValueError, OP, "state['setting']", "of 0 or more", setting, "start afresh")
        if digest != _digest(self.options):
            got, hint = str(self.options), "pass the same search, or start afresh"
            fail(ValueError, OP, "search", "with the options of the state", got, hint)

    def notes(self, names: tuple[str, ...]) -> dict[str, Note]:
        """The search and its recall, by column; a warning where that is too low."""
        # half of the sample has chosen the setting
        half = slice(1, None, 2)
        numbers = self._numbers[half]
        lists, exact = (
            NeighborLists(*(t[rows] for t in vars(each).values()))
            for each, rows in ((self.lists, numbers), (self._exact, half))
        )
        nprobe, candidates, _ = self._setting.tolist()
        search = f"approximate, nprobe {nprobe}, candidates {candidates}"
        labels = self.rows.labels
        notes = search_notes(lists, exact, labels[numbers], labels, search)
        warn_of(notes, self.options.recall)
        return {name: notes[name] for name in names}

    @property
    def _count_of_packs(self) -> int:
        return int(self._packs.max()) + 1

    def _compare_sample(self) -> None:
        queries = self.rows.chunk_at(self._numbers)
        exact = exact_lists(self.rows, queries, self._numbers, **self.sizes)
        for mine, new in zip(vars(self._exact).values(), vars(exact).values(), strict=True):
            mine.copy_(new)

    def _search_chunk(self, index: int) -> None:
        if self._search is None:
            self._search = self._built()
        chunk = self.rows.unit_chunk(index)
        numbers = torch.arange(chunk.start, chunk.start + len(chunk.unit), device=chunk.unit.device)
        merge_distinct(self.lists, numbers, self._search.search(Queries(chunk, numbers)))

    def _built(self) -> CandidateSearch:
        search = CandidateSearch(self.rows, self._packs == NO_PACK, self.options, **self.sizes)
        nprobe, candidates, _ = self._setting.tolist()
        if nprobe:
            search.setting = Setting(nprobe, candidates)
            return search
        queries = Queries(self.rows.chunk_at(self._numbers), self._numbers)
        half = NeighborLists(*(t[::2] for t in vars(self._exact).values()))
        search.fit(queries.every_second(0), half)
        self._setting[:2] = torch.tensor([search.setting.nprobe, search.setting.candidates])
        return search

    def _compare_pack(self, pack: int) -> None:
        numbers = (self._packs[self.rows.labels] == pack).nonzero().flatten()
        lists = NeighborLists.empty(len(numbers), **self.sizes, like=self.lists.similarity)
        starts = range(0, len(numbers), self.rows.chunk)
        parts = dict(zip(starts, numbers.split(self.rows.chunk), strict=True))
        for begin in starts:
            chunk = self.rows.chunk_at(parts[begin], begin)
            neighbor_statistics_(lists, chunk, chunk)
            for other in starts[starts.index(begin) + 1 :]:
                neighbor_statistics_(lists, chunk, self.rows.chunk_at(parts[other], other))
        merge_distinct(self.lists, numbers, renumbered(lists, numbers))


def _digest(options: Approximate) -> int:
    """A number that differs where the options do, of 63 bits."""
    digest = hashlib.blake2b(repr(options).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
