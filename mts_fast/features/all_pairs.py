"""Exact search: every pair of samples is compared once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor

from mts_fast.features.columns import Note
from mts_fast.features.pool_rows import PoolRows
from mts_fast.ops.neighbor_statistics import NeighborChunk, NeighborLists, neighbor_statistics_


class AllPairs:
    """Offers every pair of chunks of a pool to its lists, a unit of work each.

    Args:
        note: of every column that comes from the lists; None for no note.
    """

    def __init__(self, rows: PoolRows, lists: NeighborLists, note: Note | None) -> None:
        self.rows, self.lists, self.note = rows, lists, note
        self._in_memory: dict[int, NeighborChunk] = {}

    @property
    def total(self) -> int:
        """How many units there are."""
        count = len(self.rows.starts)
        return count * (count + 1) // 2

    def units(self) -> list[Callable[[], None]]:
        """The work, in order."""
        self._in_memory = {}
        count = len(self.rows.starts)
        return [partial(self._compare, a, b) for a in range(count) for b in range(a, count)]

    def release(self) -> None:
        """Drop the chunks in memory."""
        self._in_memory = {}

    def state(self) -> dict[str, Tensor]:
        """Nothing beside the lists."""
        return {}

    def check_state(self, state: Mapping[str, Tensor]) -> None:
        """Nothing to check."""

    def notes(self, names: tuple[str, ...]) -> dict[str, Note]:
        """By column."""
        return {} if self.note is None else {name: self.note for name in names}

    def _compare(self, first: int, second: int) -> None:
        # of the previous pair only the chunks that this one needs stay in memory
        before = self._in_memory
        self._in_memory = {i: before.get(i) or self.rows.unit_chunk(i) for i in {first, second}}
        neighbor_statistics_(self.lists, self._in_memory[first], self._in_memory[second])
