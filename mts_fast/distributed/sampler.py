"""Batches whose samples do not depend on the number of ranks, and their numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

from mts_fast._check import check_bool, check_int, check_mapping, describe, fail

OP = "GlobalBatchSampler"
# what the batches follow from
ORDER = ("size", "batch_size", "seed", "shuffle", "drop_last")


class GlobalBatchSampler(Sampler[list[int]]):
    """This rank's part of every batch of an order that all ranks share.

    Give it to a DataLoader as `batch_sampler`. The order of an epoch follows from seed and epoch
    alone, and each batch is cut into consecutive parts, one a rank, so that their joined batch is
    the one that a single process would have. Parts of a batch differ by one sample at most; of a
    last batch that is smaller than the number of ranks some are empty, which torch's default
    collation does not take: drop_last=True leaves it out.

    Args:
        size: number of samples of the data set.
        batch_size: of the joined batch, over all ranks.
        rank, ranks: this process's number and how many there are; by default those of
            torch.distributed where it is initialised, else 0 and 1.
        shuffle: another order in each epoch, or the data set's own.
        drop_last: leave out a last batch that is smaller than the others.
        seed: of the orders.

    Raises:
        TypeError, ValueError: numbers that are no whole numbers or out of range.

    Notes:
        `state_dict()` holds epoch and position, counted in batches given out; a run that resumes,
        on as many ranks or on others, gets the batches after them. A DataLoader with workers asks
        for batches ahead of those that you have seen: save `state_dict(batches)` with the number of
        batches of this epoch that you have trained on, or take torchdata's StatefulDataLoader.

    Example:
        >>> from mts_fast.distributed import GlobalBatchSampler
        >>> list(GlobalBatchSampler(10, batch_size=4, rank=1, ranks=2, shuffle=False))
        [[2, 3], [6, 7], [9]]
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        *,
        rank: int | None = None,
        ranks: int | None = None,
        shuffle: bool = True,
        drop_last: bool = False,
        seed: int = 0,
    ) -> None:
        present = _ranks_of_torch()
        self._counts_ranks = rank is None and ranks is None
        self.size = check_int(OP, "size", size, low=1)
        self.batch_size = check_int(OP, "batch_size", batch_size, low=1)
        self.ranks = check_int(OP, "ranks", present[1] if ranks is None else ranks, low=1)
        self.rank = check_int(OP, "rank", present[0] if rank is None else rank, low=0)
        if self.rank >= self.ranks:
            hint = "ranks are counted from 0"
            fail(ValueError, OP, "rank", f"below ranks ({self.ranks})", self.rank, hint)
        check_bool(OP, "shuffle", shuffle)
        check_bool(OP, "drop_last", drop_last)
        self.shuffle, self.drop_last = shuffle, drop_last
        self.seed = check_int(OP, "seed", seed, low=0)
        self.epoch = 0
        self._position = 0  # batches of this epoch that were given out

    def __len__(self) -> int:
        """Batches of an epoch."""
        whole, rest = divmod(self.size, self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        """The rest of this epoch, or the next one where it is over.

        Raises:
            RuntimeError: torch.distributed has several ranks since the sampler was made for one.
        """
        ranks = _ranks_of_torch()[1]
        if self._counts_ranks and self.ranks == 1 and ranks > 1:
            hint = "make the sampler after init_process_group, or pass rank= and ranks="
            got = f"{ranks}, which were initialised later"
            fail(RuntimeError, OP, "ranks", "1, as when the sampler was made", got, hint)
        if self._position >= len(self):
            self.set_epoch(self.epoch + 1)
        order = self._order()
        while self._position < len(self):
            start = self._position * self.batch_size
            batch = order[start : start + self.batch_size]
            self._position += 1
            yield batch.tensor_split(self.ranks)[self.rank].tolist()

    @property
    def epochs_done(self) -> int:
        """Epochs that were given out whole."""
        return self.epoch + (self._position >= len(self))

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch; an iteration after one that has ended begins the next by itself."""
        self.epoch = check_int(OP, "epoch", epoch, low=0)
        self._position = 0

    def state_dict(self, batches: int | None = None) -> dict[str, int]:
        """Where the order is; `batches` of this epoch count as used, by default those given out."""
        position = self._position if batches is None else check_int(OP, "batches", batches, low=0)
        return {
            "epoch": self.epoch,
            "position": position,
            **{name: int(getattr(self, name)) for name in ORDER},
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on behind the batches of a state.

        Raises:
            TypeError, ValueError: no state, or one of another data set or order.
        """
        entries = check_mapping(OP, "state", state, "pass what state_dict() gave")
        for name in ORDER:
            if entries.get(name) != int(getattr(self, name)):
                hint = "make the sampler as the saved one was made"
                expected = f"of a sampler with {name} {getattr(self, name)}"
                fail(ValueError, OP, "state", expected, describe(entries.get(name)), hint)
        epoch = check_int(OP, "state['epoch']", entries.get("epoch"), low=0)
        position = check_int(OP, "state['position']", entries.get("position"), low=0)
        self.epoch, self._position = epoch, position

    def _order(self) -> torch.Tensor:
        if not self.shuffle:
            return torch.arange(self.size)
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        return torch.randperm(self.size, generator=generator)


class IndexedDataset(Dataset[tuple[int, Any]]):
    """A data set whose entries come with their number: (i, dataset[i]).

    The number finds a sample's features, and its counts over epochs, on whatever rank it turns up.

    Example:
        >>> from mts_fast.distributed import IndexedDataset
        >>> IndexedDataset(["a", "b"])[1]
        (1, 'b')
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, self.dataset[index]

    def __len__(self) -> int:
        return len(self.dataset)


def _ranks_of_torch() -> tuple[int, int]:
    dist = torch.distributed
    if not dist.is_available() or not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()
