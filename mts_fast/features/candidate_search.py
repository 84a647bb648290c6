"""Nearest neighbours of samples in a pool, or in a rank's part of it: candidates from inverted
lists, ranked by their exact cosines."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mts_fast.features.candidate_index import NOBODY, CandidateIndex, Codebook, default_lists
from mts_fast.features.cosines import Cosines
from mts_fast.features.pool_rows import PoolRows
from mts_fast.features.recall import recall_of, smallest
from mts_fast.features.search import Approximate
from mts_fast.ops.neighbor_statistics import NeighborChunk, NeighborLists
from mts_fast.reference.neighbor_statistics import EXCLUDED, top_neighbors

logger = logging.getLogger("mts_fast")
# bytes of candidates that are ranked at once
RANKED_BYTES = 16 * 2**20
# candidates for each neighbour that are tried, in order of cost
CANDIDATES = (4, 8, 16, 32, 64)
# more probes that gain less recall than this are not worth their time
LEAST_GAIN = 0.002


@dataclass(frozen=True)
class Setting:
    """How thoroughly the lists are looked through."""

    nprobe: int
    candidates: int  # for each neighbour


@dataclass(frozen=True)
class Queries:
    """A sample of the pool, and which of it are samples of the part that is searched."""

    chunk: NeighborChunk
    numbers: Tensor  # [q] in the part, NOBODY for those of another rank

    def every_second(self, first: int) -> Queries:
        """Half of them, from the first or the second on."""
        rows = slice(first, None, 2)
        c = self.chunk
        half = NeighborChunk(c.unit[rows], c.labels[rows], c.is_synthetic[rows], 0)
        return Queries(half, self.numbers[rows])


class CandidateSearch:
    """An index of a part of a pool, and one of each of its large classes by source.

    Args:
        rows: the part, in which samples have their numbers.
        large: [C] bool, classes that are searched; the lists of the others' classes stay empty.
        options: of the search.
        k, neighbors: lengths of the lists.
    """

    def __init__(
        self, rows: PoolRows, large: Tensor, options: Approximate, *, k: int, neighbors: int
    ) -> None:
        self.rows, self.large, self.options = rows, large, options
        self.k, self.neighbors = k, neighbors
        self.setting = Setting(options.nprobe or 1, options.candidates or CANDIDATES[0])
        classes = len(large)
        # of a class and a source: its samples here
        self._group = rows.labels + classes * rows.is_synthetic
        self._counts = torch.bincount(self._group, minlength=2 * classes)
        self._generator = torch.Generator().manual_seed(options.seed)
        logger.info("distribution_features: training an index of %d samples", rows.size)
        self._codebook: Codebook | None = None
        self._pool = self._trained(torch.arange(rows.size))
        self._classes = {
            group: self._trained((self._group == group).nonzero().flatten())
            for group in range(2 * classes)
            if self.large[group % classes] and self._counts[group]
        }
        self._cosines = Cosines(rows)
        self._add_all()

    def fit(self, queries: Queries, exact: NeighborLists) -> None:
        """Choose the setting that reaches the recall of the options on queries [q], and a standard
        error more. `exact` are their neighbours in this part."""
        options = self.options
        large = self.large[queries.chunk.labels]
        probes = 1
        for candidates in (options.candidates,) if options.candidates else CANDIDATES:
            last = -1.0
            while True:
                self.setting = Setting(options.nprobe or probes, candidates)
                recall = smallest(recall_of(self.search(queries), exact, large))
                # a margin for the other samples, which would fall below in half of the cases
                error = math.sqrt(recall * (1 - recall) / len(large))
                if recall - error >= options.recall:
                    return
                if options.nprobe or probes >= self._pool.nlist or recall < last + LEAST_GAIN:
                    break
                last, probes = recall, 2 * probes
            # with more candidates fewer probes may do
            probes = max(1, probes // 4)

    def search(self, queries: Queries) -> NeighborLists:
        """Lists [q] of the queries' neighbours in this part, by their numbers there; real and
        synthetic ones of large classes alone."""
        candidates = self._candidates(queries)
        row_bytes = self.rows.dimension * queries.chunk.unit.element_size()
        step = max(1, RANKED_BYTES // (candidates.shape[1] * row_bytes))
        lists = [
            vars(self._ranked(chunk, numbers, some)).values()
            for chunk, numbers, some in zip(
                queries.chunk.split(step),
                queries.numbers.split(step),
                candidates.split(step),
                strict=True,
            )
        ]
        return NeighborLists(*(torch.cat(t) for t in zip(*lists, strict=True)))

    def _trained(self, numbers: Tensor) -> CandidateIndex:
        """An index for the samples `numbers`, trained on some of them."""
        size, options = len(numbers), self.options
        nlist = default_lists(size)
        if options.nlist is not None:
            nlist = max(1, round(options.nlist * size / self.rows.size))
        drawn = torch.randperm(size, generator=self._generator)
        chosen = numbers[drawn[: CandidateIndex.training_rows(size, nlist)].sort().values]
        training = self.rows.unit_at(chosen)
        if self._codebook is None:  # of the pool, which comes first
            self._codebook = Codebook(training, options.seed)
        keep = max(self.k, self.neighbors) + 1
        return CandidateIndex(self._codebook, training, size, nlist, options.seed, keep)

    def _add_all(self) -> None:
        for index in range(len(self.rows.starts)):
            chunk = self.rows.unit_chunk(index)
            numbers = torch.arange(chunk.start, chunk.start + len(chunk.unit))
            self._pool.add(chunk.unit, numbers)
            groups = self._group[self.rows.slice(index)]
            for group in self._present(groups):
                chosen = groups == group
                self._classes[group].add(chunk.unit[chosen], numbers[chosen.cpu()])

    def _present(self, groups: Tensor) -> list[int]:
        """Those of some groups that have an index."""
        return [group for group in groups.unique().tolist() if group in self._classes]

    def _candidates(self, queries: Queries) -> Tensor:
        """Numbers [q, M] in this part, some of them twice or NOBODY."""
        chunk, each = queries.chunk, self.setting.candidates
        size, classes = len(chunk.unit), len(self.large)
        # one more than is asked for: a sample finds itself
        pool, of_class = (self.neighbors + 1) * each, (self.k + 1) * each
        if not self.large[chunk.labels].any():
            of_class = self.k  # empty, as long as the lists
        columns = chunk.labels.new_full((size, pool + 2 * of_class), NOBODY)
        numbers = self._thorough(self._pool, chunk.unit, pool, self.neighbors)
        columns[:, : numbers.shape[1]] = numbers
        for label in chunk.labels.unique().tolist():
            chosen = (chunk.labels == label).nonzero().flatten()
            for source in (0, 1):
                index = self._classes.get(label + classes * source)
                if index is None:
                    continue
                begin = pool + source * of_class
                numbers = self._thorough(index, chunk.unit[chosen], of_class, self.k)
                columns[chosen, begin : begin + numbers.shape[1]] = numbers
        return columns

    def _thorough(self, index: CandidateIndex, unit: Tensor, count: int, least: int) -> Tensor:
        """Numbers [q, *] of candidates; `least` others than the sample itself where there are."""
        numbers = index.search(unit, count, self.setting.nprobe)
        needed = min(least + 1, index.size)
        short = numbers[:, needed - 1] == NOBODY
        if short.any():
            numbers[short] = index.search(unit[short], count, index.nlist)
            short = numbers[:, needed - 1] == NOBODY
            numbers[short, :needed] = index.lowest[:needed].to(numbers.device)
        return numbers

    def _ranked(self, chunk: NeighborChunk, numbers: Tensor, candidates: Tensor) -> NeighborLists:
        """Lists of a chunk [n] from candidates [n, M]."""
        candidates = candidates.sort(1).values  # ties then go to the lowest number
        usable = (candidates != NOBODY) & (candidates != numbers[:, None])
        usable[:, 1:] &= candidates[:, 1:] != candidates[:, :-1]
        candidates = candidates.clamp(min=0)
        similarity = self._cosines.of(chunk.unit, candidates).masked_fill(~usable, EXCLUDED)
        best, place = top_neighbors(similarity, self.neighbors)
        none = torch.iinfo(torch.int64).max
        index = candidates.gather(1, place).masked_fill(best == EXCLUDED, none)
        labels, synthetic = self.rows.labels[candidates], self.rows.is_synthetic[candidates]
        same = (labels == chunk.labels[:, None]) & self.large[chunk.labels][:, None]
        real, of_synthetic = (
            similarity.masked_fill(~(same & chosen), EXCLUDED).topk(self.k, dim=1).values
            for chosen in (~synthetic, synthetic)
        )
        return NeighborLists(best, index, real, of_synthetic)
