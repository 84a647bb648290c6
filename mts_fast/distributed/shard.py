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

    def __len__(self) -> int:
        return self.sizes[self.index]

    def mine(self, rows: Tensor) -> Tensor:
        """This rank's rows of a tensor [total, ...]; the tensor itself on one rank."""
        if len(self.sizes) < 2:
            return rows
        start = sum(self.sizes[: self.index])
        return rows[start : start + len(self)]

    def joined(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Each rank's part [largest size, ...] without its padding."""
        return [part[:size] for part, size in zip(parts, self.sizes, strict=True)]
