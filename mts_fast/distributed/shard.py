"""Which rows of a global batch one rank has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Shard:
    """The rows of rank `index`; `sizes` are those of all ranks, in their order.

    Without sizes: all rows, however many.
    """

    sizes: tuple[int, ...] = ()
    index: int = 0

    @classmethod
    def whole(cls, size: int) -> Shard:
        """All rows, on one rank."""
        return cls((size,), 0)

    @property
    def total(self) -> int:
        """Rows of all ranks."""
        return sum(self.sizes)

    @classmethod
    def even(cls, total: int, ranks: int, index: int) -> Shard:
        """Rows divided as evenly as can be."""
        share, more = divmod(total, ranks)
        return cls(tuple(share + (rank < more) for rank in range(ranks)), index)

    def __len__(self) -> int:
        return self.sizes[self.index]

    def bounds(self, rank: int) -> tuple[int, int]:
        """The first row of a rank, and the one after its last."""
        start = sum(self.sizes[:rank])
        return start, start + self.sizes[rank]

    def mine(self, rows: Tensor) -> Tensor:
        """This rank's rows of a tensor [total, ...]; the tensor itself on one rank."""
        if len(self.sizes) < 2:
            return rows
        start, end = self.bounds(self.index)
        return rows[start:end]

    def joined(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Each rank's part [largest size, ...] without its padding."""
        return [part[:size] for part, size in zip(parts, self.sizes, strict=True)]
