"""Rows of a joined tensor that change their rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mts_fast.distributed.shard import Shard

# (received, sent, rows received of each rank, rows sent to each): one exchange of all ranks
Exchange = Callable[[Tensor, Tensor, list[int], list[int]], None]


@dataclass(frozen=True)
class Moves:
    """From one division of the rows among ranks to another one, in the same order.

    sent, received: rows to and from each rank, this one's excluded.
    """

    sent: list[int]
    received: list[int]
    stays: int  # rows of this rank before and after
    index: int
    none: bool  # no rank has anything to send

    @classmethod
    def between(cls, before: Shard, after: Shard) -> Moves:
        """Those of this rank."""
        ranks, mine = range(len(before.sizes)), before.index
        shared = [[_common(before, s, after, d) for d in ranks] for s in ranks]
        return cls(
            [0 if d == mine else shared[mine][d] for d in ranks],
            [0 if s == mine else shared[s][mine] for s in ranks],
            shared[mine][mine],
            mine,
            all(shared[s][d] == 0 for s in ranks for d in ranks if s != d),
        )

    def of(self, rows: Tensor, exchange: Exchange) -> Tensor:
        """The rows [after, bytes] here, of rows [before, bytes]."""
        if self.none:
            return rows
        first = sum(self.sent[: self.index])
        mine = rows[first : first + self.stays]
        sent = torch.cat([rows[:first], rows[first + self.stays :]])
        received = rows.new_empty(sum(self.received), rows.shape[1])
        exchange(received, sent, self.received, self.sent)
        lower = sum(self.received[: self.index])
        return torch.cat([received[:lower], mine, received[lower:]])


def _common(before: Shard, source: int, after: Shard, target: int) -> int:
    """Rows that are the source's before and the target's after."""
    (a, b), (c, d) = before.bounds(source), after.bounds(target)
    return max(0, min(b, d) - max(a, c))
