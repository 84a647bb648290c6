"""Which rank computes which drawn samples: as many each as can be, moved where they have to be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from mts_fast._isolation import Restoring, RngState
from mts_fast.distributed import Ranks, Shard
from mts_fast.hypergradient import LabelledBatch
from mts_fast.hypergradient.nests import map_tensors
from mts_fast.training.batch import CheckedBatch


class Placed(NamedTuple):
    """The drawn samples that are computed here."""

    batch: LabelledBatch
    shard: Shard  # of all that are computed, in the order of the draw
    rows: Tensor  # int64, of this rank's batch that were drawn


@contextmanager
def seeded(ranks: Ranks, where: Tensor) -> Iterator[None]:
    """Inside, torch's default generators of the CPU and of a tensor's device are alike on all
    ranks; afterwards as they were. One process draws from them as they are."""
    if ranks.size == 1:
        yield
        return
    with Restoring(RngState.capture([where]).restore):
        ranks.seed()
        yield


def place(ranks: Ranks, batch: CheckedBatch, indices: Tensor, *, may_move: bool) -> Placed:
    """Divide the drawn samples among ranks.

    Reads on the host how many each rank has: with several ranks it waits for the device.

    Args:
        batch: the candidates here.
        indices: [k], ascending, of the candidates of all ranks.
        may_move: whether a sample may be computed on another rank than its own.
    """
    shard = batch.shard
    if ranks.size == 1:
        return Placed(batch.at(indices), Shard.whole(len(indices)), indices)
    ends = torch.tensor(shard.sizes, device=indices.device).cumsum(0)
    counts = torch.searchsorted(indices, ends).diff(prepend=ends.new_zeros(1))
    before = Shard(tuple(counts.tolist()), shard.index)
    rows = before.mine(indices) - shard.bounds(shard.index)[0]
    if not may_move:
        return Placed(ranks.together(lambda: batch.at(rows)), before, rows)
    after = Shard.even(len(indices), ranks.size, shard.index)
    here: LabelledBatch = batch

    def movable() -> list[Tensor] | None:
        nonlocal here
        here = batch.at(rows)
        return _movable(here)

    tensors = ranks.moved("drawn samples", before, after, movable)
    if tensors is None:
        return Placed(here, before, rows)
    labels, *inputs = tensors
    remaining = iter(inputs)
    nest = map_tensors(here.inputs, lambda t: next(remaining) if t.ndim else t)
    return Placed(LabelledBatch(nest, labels, name=here.name), after, rows)


def _movable(batch: LabelledBatch) -> list[Tensor] | None:
    """Labels and inputs; None where these have no rows side by side in memory."""
    tensors = [batch.labels, *(t for t in batch.tensors() if t.ndim)]
    plain = all(t.layout == torch.strided and not t.is_nested for t in tensors)
    return tensors if plain else None
