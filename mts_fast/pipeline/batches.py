"""Which samples each step of an epoch sees: a permutation by seed and epoch, nothing dropped."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from mts_fast.selection import MixedBatchSampler


def seed_of(*parts: int | str) -> int:
    """A seed below 2^63 of what it is for: the run's, an epoch, a purpose."""
    digest = hashlib.sha256(" ".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class EpochBatches:
    """Every sample once an epoch, in random order; the last batch may be smaller.

    A last batch of one sample joins the batch before it, since BatchNorm needs two.
    """

    def __init__(self, members: Tensor, batch_size: int, seed: int) -> None:
        self.members = members
        self.size = len(members)
        self.batch_size = min(batch_size, self.size)
        self.seed = seed

    def __len__(self) -> int:
        whole, left = divmod(self.size, self.batch_size)
        return whole + (left > 1 or (left == 1 and self.batch_size == 1))

    def epoch(self, number: int) -> Iterator[Tensor]:
        """Indices of each batch."""
        generator = torch.Generator().manual_seed(seed_of(self.seed, number, "order"))
        order = self.members[torch.randperm(self.size, generator=generator)]
        for i in range(len(self)):
            last = i + 1 == len(self)
            yield order[i * self.batch_size : None if last else (i + 1) * self.batch_size]


class WeightedBatches:
    """The recipe of mts_fast.selection: a share of each batch clean, the rest drawn by weight."""

    def __init__(
        self,
        members: Tensor,
        weights: Tensor,
        clean: Tensor,
        batch_size: int,
        steps: int,
        *,
        share: float,
        labels: Tensor,
        seed: int,
    ) -> None:
        self.members = torch.cat([members, clean])
        self.steps = steps
        self.sampler = MixedBatchSampler(
            weights,
            len(clean),
            max(2, min(batch_size, len(self.members))),
            num_batches=steps,
            clean_share=share,
            labels=labels[members],
            seed=seed,
        )

    def __len__(self) -> int:
        return self.steps

    def epoch(self, number: int) -> Iterator[Tensor]:
        """Indices of each batch."""
        self.sampler.set_epoch(number)
        for chosen in self.sampler:
            yield self.members[torch.tensor(chosen)]
