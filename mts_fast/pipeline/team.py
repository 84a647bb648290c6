"""The processes that run one command together: the first reads and writes, all of them compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from mts_fast.distributed import Alone, Ranks, Shard, ranks_of
from mts_fast.distributed.wrappers import group_of

T = TypeVar("T")


class Team:
    """Every process calls the same methods in the same order.

    Errors of work that is passed as a function are raised on every rank, so that none waits alone.
    """

    def __init__(self, ranks: Ranks, op: str) -> None:
        self.ranks = ranks
        self.op = op
        self.size, self.index = ranks.size, ranks.index
        self.leads = ranks.index == 0

    def led(self, compute: Callable[[], T]) -> T:
        """Work of the first process, whose result all have."""
        return self.ranks.led(compute)

    def alone(self, act: Callable[[], object]) -> None:
        """Work of the first process; all go on after it, or none."""
        self.ranks.together(act if self.leads else _nothing)

    def together(self, compute: Callable[[], T]) -> T:
        """Work of each process, after which all go on, or none."""
        return self.ranks.together(compute)

    def in_turn(self, compute: Callable[[], T]) -> T:
        """Work of each process, of the first one before the others: it may fill a cache."""
        first = self.ranks.together(compute if self.leads else _nothing)
        others = self.ranks.together(_nothing if self.leads else compute)
        return first if self.leads else others  # type: ignore[return-value]

    def part(self, rows: Tensor) -> Tensor:
        """This process's rows of a batch [B, ...]: consecutive ones, perhaps none."""
        return rows.tensor_split(self.size)[self.index] if self.size > 1 else rows

    def sizes(self, count: int) -> tuple[int, ...]:
        """Rows that each process has of a batch."""
        return tuple(len(part) for part in torch.arange(count).tensor_split(self.size))

    def seed(self, seed: int) -> int:
        """A seed of each process's own; that of the first is `seed`."""
        return (seed + self.index) % 2**63

    def gradients_of(self, model: nn.Module) -> Ranks:
        """The processes as those that sum gradients of a model, on its device."""
        return ranks_of(self.op, model, "auto" if self.size > 1 else None)

    def total(self, number: float) -> float:
        """The sum over all processes."""
        shard = Shard((1,) * self.size, self.index)
        rows = self.ranks.rows(
            "number", shard, lambda: [torch.tensor([number], dtype=torch.float64)]
        )
        return float(rows[0].sum())

    def mapped(
        self, name: str, members: Tensor, size: int, compute: Callable[[Tensor], list[Tensor]]
    ) -> list[Tensor]:
        """Tensors [M, ...] of `members` [M], computed `size` at a time, each by one process.

        What is computed at a time does not depend on the number of processes, and so neither does
        the result.

        Args:
            name: of the exchange, one for each kind of tensors.
            compute: members [n] -> tensors [n, ...] on the CPU.
        """
        chunks = members.split(size)
        of_ranks = torch.arange(len(chunks)).tensor_split(self.size)
        sizes = tuple(sum(len(chunks[i]) for i in numbers) for numbers in of_ranks)

        def rows() -> list[Tensor]:
            parts = [compute(chunks[i]) for i in of_ranks[self.index]]
            return [torch.cat(column) for column in zip(*parts, strict=True)]

        return self.ranks.rows(name, Shard(sizes, self.index), rows)

    def copy_buffers(self, model: nn.Module) -> None:
        """Give every process the first one's buffers, such as running statistics."""
        if self.size == 1:
            return
        values = self.led(lambda: [b.detach().cpu() for b in model.buffers()])
        with torch.no_grad():
            for buffer, value in zip(model.buffers(), values, strict=True):
                buffer.copy_(value)


def _nothing() -> None:
    """What a process does while another one works."""


def team_of(op: str) -> Team:
    """All processes of torch.distributed where it is initialised, else this one; `op` is what
    errors name."""
    group = group_of(op, "auto")
    if group is None:
        return Team(Alone(), op)
    from mts_fast.distributed.group import Group

    return Team(Group(op, group, torch.device("cpu"), in_band=True), op)


ALONE = Team(Alone(), "train")
