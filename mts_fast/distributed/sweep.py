"""A DistributionSweep whose pairs of chunks are shared by ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from mts_fast._check import fail
from mts_fast.distributed.group import Group
from mts_fast.distributed.packing import Layout
from mts_fast.distributed.shard import Shard
from mts_fast.features import Approximate, DistributionSweep
from mts_fast.features.all_pairs import AllPairs
from mts_fast.features.pool_checks import OP
from mts_fast.features.search import EXACT_NOTE
from mts_fast.features.sweep import CHUNK, EmbeddingSource
from mts_fast.ops.neighbor_statistics import NeighborLists
from mts_fast.reference.neighbor_statistics import merge_lists


class SharedSweep(DistributionSweep):
    """The sweep of one process, each rank comparing its part of the pairs of chunks.

    Every rank reads the whole source, makes the same calls, and has the same result: bit for bit
    that of one process, since what a pair shows does not depend on the pairs before it. What takes
    one reading of each chunk (centroids, distances) every rank does by itself. States are those of
    one process, for as many ranks as resume.

    Args:
        ranks: the ranks; all other arguments as for `DistributionSweep`.
    """

    def __init__(
        self,
        ranks: Group,
        source: EmbeddingSource | Tensor,
        labels: Tensor,
        is_synthetic: Tensor,
        *,
        k: int = 3,
        neighbors: int = 5,
        small_class: str = "error",
        chunk: int = CHUNK,
        search: str | Approximate = "exact",
    ) -> None:
        self._ranks = ranks
        super().__init__(
            *(source, labels, is_synthetic),
            k=k,
            neighbors=neighbors,
            small_class=small_class,
            chunk=chunk,
            search=search,
        )

    def _searched(self, options: Approximate | None, k: int, neighbors: int) -> AllPairs:
        if options is not None and len(self.labels) >= options.exact_below:
            hint = (
                "run one process, whose threads share it, or call"
                " mts_fast.distributed.distribution_features from Python"
            )
            expected = "exact where several processes share a sweep"
            fail(ValueError, OP, "search", expected, "approximate", hint)
        self._apart = self._no_lists()  # of pairs that other ranks do not know of
        return AllPairs(self._rows, self._apart, None if options is None else dict(EXACT_NOTE))

    def run(self) -> Iterator[int]:
        """Do what is left, a pair for each rank at a time; yields how many units are done.

        Raises:
            TypeError, ValueError: as in one process; FailedElsewhere on the other ranks.
            RuntimeError: another rank has died, or an exception cut a unit short.
        """
        self._check_whole()
        units = self._units()
        first, last = len(self.starts), self.total - len(self.starts)
        while self.done < self.total:
            rank = 0
            count = 1
            if first <= self.done < last:
                rank, count = self._ranks.index, min(self._ranks.size, last - self.done)
            self._whole = False
            self._ranks.together(units[self.done + rank] if rank < count else _nothing)
            self.done += count
            self._whole = True
            if self.done == last:
                self._merge()
            yield self.done
        self._neighbors.release()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """As of one process. Every rank calls it."""
        super().load_state_dict(state)
        self._apart = self._neighbors.lists = self._no_lists()

    def state_dict(self) -> dict[str, Tensor]:
        """As of one process. Every rank calls it."""
        self._check_whole()
        self._merge()
        return super().state_dict()

    def _merge(self) -> None:
        """Give every rank what all of them have compared: each merges its part of the samples."""
        ranks = self._ranks
        fields = list(vars(self._apart).values())
        layout = Layout.of(fields)
        parts = [field.tensor_split(ranks.size) for field in fields]
        shard = Shard(tuple(map(len, parts[0])), ranks.index)
        mine = NeighborLists(*(part[ranks.index].clone() for part in parts))
        for offset in range(1, ranks.size):
            to, sender = (ranks.index + offset) % ranks.size, (ranks.index - offset) % ranks.size
            sent = layout.packed([part[to] for part in parts], fields[0].device)
            received = ranks.swapped(sent, to, sender, len(shard))
            merge_lists(mine, NeighborLists(*layout.unpacked(received)), 0)
        merged = ranks.rows("neighbours", shard, lambda: list(vars(mine).values()))
        merge_lists(self._lists, NeighborLists(*merged), 0)
        self._apart = self._neighbors.lists = self._no_lists()

    def _no_lists(self) -> NeighborLists:
        lists = self._lists
        return NeighborLists.empty(
            len(self.labels),
            k=lists.real.shape[1],
            neighbors=lists.index.shape[1],
            like=self._cosines,
        )


def _nothing() -> None:
    """What a rank without a pair does in a round."""
