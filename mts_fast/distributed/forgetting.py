"""Forgetting counts of samples that any rank may predict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mts_fast import features
from mts_fast._check import check_bool, check_range, fail
from mts_fast.distributed.by_number import first_of_each, ranks_of_hosts
from mts_fast.distributed.ranks import Header

OP = "ForgettingCounter"


class ForgettingCounter(features.ForgettingCounter):
    """A `features.ForgettingCounter` of the predictions of all ranks, by epochs.

    `update` keeps what this rank has predicted and sends nothing. `end_epoch`, which every rank
    calls, joins the predictions of all and counts each sample once, so that a sample that a sampler
    repeats to make the ranks' parts equal does not count twice. Of a sample with several
    predictions in an epoch the first one of the lowest rank counts. After it counts, columns and
    state are the same on every rank, and those of one process that saw the same predictions.

    Args:
        num_samples: of the data set, the same on every rank.
        device: where counts are kept.
        process_group: "auto", all ranks where torch.distributed is initialised; a group; or None,
            this process alone.

    Raises:
        TypeError, ValueError: no positive number, no such device, no process group.

    Notes:
        An epoch sends 9 bytes for each of a rank's predictions to every rank.

    Example:
        >>> import torch
        >>> from mts_fast.distributed import ForgettingCounter
        >>> counter = ForgettingCounter(2)  # one process here
        >>> for guess in ([1, 0], [0, 0]):
        ...     counter.update(torch.tensor([0, 1, 0]), torch.tensor([*guess, 1]) == 1)
        ...     predicted = counter.end_epoch()
        >>> counter.counts.tolist(), predicted
        ([1, 0], 2)
    """

    def __init__(
        self,
        num_samples: int,
        device: torch.device | str = "cpu",
        *,
        process_group: Any = "auto",
    ) -> None:
        super().__init__(num_samples, device)
        self._ranks = ranks_of_hosts(OP, process_group)
        # of this epoch, as far as the ranks have joined it
        self._seen = torch.zeros_like(self._last)
        self._correct = torch.zeros_like(self._last)
        self._epoch = torch.zeros(1, dtype=torch.int64, device=self.counts.device)
        self._since: list[tuple[Tensor, Tensor]] = []  # this rank's predictions since then

    @property
    def epochs(self) -> int:
        """How many have ended."""
        return int(self._epoch)

    def update(self, indices: Tensor, correct: Tensor) -> None:
        """Keep predictions of this rank: indices [B] of the samples, correct [B] bool or 0/1.

        Raises:
            TypeError, ValueError: as for `features.ForgettingCounter.update`; samples may be
                repeated.
        """
        # copies: the caller may write to a batch's tensors
        numbers, flags = self._checked(indices, correct, distinct=False)
        self._since.append((numbers.clone(), flags.clone()))

    def merge(self) -> None:
        """Join the predictions of all ranks in the middle of an epoch; every rank calls it.

        It makes `state_dict()` possible there. A sample that was joined keeps its prediction for
        this epoch.

        Raises:
            ValueError: ranks of different numbers of samples or epochs, or in different calls.
            RuntimeError: another rank has failed, by its number. Nothing has changed.
        """
        self._merge("merge")

    def end_epoch(self, *, complete: bool = False) -> int:
        """Join the predictions of all ranks and count them; every rank calls it.

        Args:
            complete: whether every sample of the data set must have been predicted.

        Returns:
            how many samples were predicted in this epoch.

        Raises:
            ValueError: as for `merge`; no predictions on any rank since the last epoch; with
                `complete`, samples that no rank has predicted (with their numbers).
            RuntimeError: another rank has failed, by its number. Nothing is counted.
        """
        op = f"{OP}.end_epoch"
        check_bool(op, "complete", complete)
        self._merge(f"end_epoch(complete={complete})")
        predicted = int(self._seen.sum())
        if not predicted:
            hint = "call update() before end_epoch(), which ends an epoch once"
            fail(ValueError, op, "the epoch", "of some predictions", "none on any rank", hint)
        if complete and predicted < len(self._seen):
            missing = (~self._seen).nonzero().flatten().tolist()
            expected = f"of all {len(self._seen)} samples"
            got = f"none for {len(missing)} of them ({', '.join(map(str, missing[:5]))})"
            fail(ValueError, op, "the epoch", expected, got, "update() with the rest, or leave out")
        indices = self._seen.nonzero().flatten()
        self._count(indices, self._correct[indices])
        self._seen.zero_()
        self._epoch += 1
        return predicted

    def state_dict(self) -> dict[str, Tensor]:
        """Counts, last predictions and those of this epoch, the same on every rank; any number of
        ranks can go on with it.

        Raises:
            RuntimeError: predictions of this rank that the others have not.
        """
        if self._since:
            got = f"{len(self._since)} calls of update() since"
            hint = "call merge() or end_epoch() on every rank first"
            fail(RuntimeError, f"{OP}.state_dict", "the predictions", "those of all", got, hint)
        return super().state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over the state of a counter of the same size, saved on any rank of any number.

        Predictions since the last `merge` or `end_epoch` are dropped.

        Raises:
            TypeError, ValueError: not such a state; nothing is changed.
        """
        super().load_state_dict(state)
        self._since.clear()

    def _state(self) -> dict[str, Tensor]:
        return {
            **super()._state(),
            "seen": self._seen,
            "correct": self._correct,
            "epoch": self._epoch,
        }

    def _merge(self, call: str) -> None:
        """Join what the ranks have since the last time."""

        def predictions() -> tuple[Tensor, Tensor]:
            none = (torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool))
            indices, flags = (
                torch.cat([t.cpu() for t in each]) for each in zip(none, *self._since, strict=True)
            )
            # of those on a GPU, where update() does not wait to check them
            check_range(OP, "indices", indices, 0, len(self.counts))
            return indices, flags

        def header(mine: tuple[Tensor, Tensor]) -> Header:
            same = {
                "num_samples": len(self.counts),
                "the number of epochs": self.epochs,
                "the sum of counts": int(self.counts.sum()),
                "the call": call,
            }
            return Header((len(mine[0]),), same)

        mine, opened = self._ranks.open(predictions, header)
        shard = opened.shards[0]
        if shard.total:
            indices, flags = self._ranks.rows("predictions", shard, lambda: mine)
            first = first_of_each(indices)
            place = self.counts.device
            indices, flags = indices[first].to(place), flags[first].to(place)
            new = ~self._seen[indices]
            self._correct[indices[new]] = flags[new]
            self._seen[indices] = True
        self._since.clear()
