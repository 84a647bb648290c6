"""What a step asks of the processes that take it together, and the answer of a single one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeVar

from torch import Tensor

from mts_fast.distributed.shard import Shard

if TYPE_CHECKING:
    import torch.distributed as dist

T = TypeVar("T")
# gradients, None where there is none, and further sums [] each
Sums = tuple[list[Tensor | None], list[Tensor]]


@dataclass(frozen=True)
class Header:
    """What ranks tell each other at the start of a call.

    sizes: rows of each of the call's batches here.
    same: what must be equal on all ranks, by the name that an error says.
    probing: whether this rank's dots are to be checked in this call; one suffices.
    number: of the call, for the numbers that ranks draw alike in it.
    """

    sizes: tuple[int, ...]
    same: Mapping[str, object] = field(default_factory=dict)
    probing: bool = False
    number: int = 0


@dataclass(frozen=True)
class Opened:
    """A call that all ranks have begun."""

    shards: tuple[Shard, ...]  # one for each size of the header
    probing: bool


class Ranks(Protocol):
    """Processes that take a step together.

    Work that may fail is passed as a function: a rank that fails still enters the exchange that the
    others wait in, and all of them raise.
    """

    size: int
    index: int
    group: dist.ProcessGroup | None  # None of a process alone

    def open(self, check: Callable[[], T], header: Callable[[T], Header]) -> tuple[T, Opened]:
        """Begin a call: `check` makes its arguments, `header` what the others are told of them."""

    def rows(
        self, name: str, shard: Shard, compute: Callable[[], Sequence[Tensor]]
    ) -> list[Tensor]:
        """Each tensor [rows here, ...] of `compute`, as that of all ranks [total, ...].

        `name` is that of the exchange: one kind of tensors each.
        """

    def moved(
        self,
        name: str,
        before: Shard,
        after: Shard,
        compute: Callable[[], Sequence[Tensor] | None],
    ) -> list[Tensor] | None:
        """Each tensor [rows before, ...] of `compute`, as rows [rows after, ...] in the same order.

        None on all ranks where one has no such tensors, or rows of another shape than the others.
        """

    def summed(
        self, name: str, like: Sequence[Tensor], extra: int, compute: Callable[[], Sums]
    ) -> Sums:
        """Gradients of the parameters `like`, and `extra` further numbers, summed over ranks.

        `name` is that of the sum, whose gradients are computed alike in every call.
        """

    def together(self, compute: Callable[[], T]) -> T:
        """Work after which no rank goes on alone."""

    def led(self, compute: Callable[[], T]) -> T:
        """Work of rank 0 alone, whose result every rank has (pickled)."""

    def union(self, flags: Sequence[bool]) -> list[bool]:
        """Each set where one of the ranks has it set."""

    def seed(self) -> None:
        """Seed torch's default generators alike on all ranks, anew each time; by rank 0's seed and
        the number of the call, so that a call that is resumed draws as it would have."""


class Alone:
    """One process."""

    size = 1
    index = 0
    group: dist.ProcessGroup | None = None

    def open(self, check: Callable[[], T], header: Callable[[T], Header]) -> tuple[T, Opened]:
        """Nobody is told."""
        checked = check()
        told = header(checked)
        return checked, Opened(tuple(map(Shard.whole, told.sizes)), told.probing)

    def rows(
        self, name: str, shard: Shard, compute: Callable[[], Sequence[Tensor]]
    ) -> list[Tensor]:
        """The tensors themselves."""
        return list(compute())

    def moved(
        self,
        name: str,
        before: Shard,
        after: Shard,
        compute: Callable[[], Sequence[Tensor] | None],
    ) -> list[Tensor] | None:
        """The tensors themselves."""
        tensors = compute()
        return None if tensors is None else list(tensors)

    def summed(
        self, name: str, like: Sequence[Tensor], extra: int, compute: Callable[[], Sums]
    ) -> Sums:
        """The sums themselves."""
        return compute()

    def together(self, compute: Callable[[], T]) -> T:
        """The work itself."""
        return compute()

    def led(self, compute: Callable[[], T]) -> T:
        """The work itself."""
        return compute()

    def union(self, flags: Sequence[bool]) -> list[bool]:
        """The flags themselves."""
        return list(flags)

    def seed(self) -> None:
        """One process has one stream of numbers."""
