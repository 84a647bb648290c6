"""Row 5: the gradient of the validation loss at other parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from mts_fast._isolation import (
    preserved_buffers,
    preserved_rng,
    training_mode,
)
from mts_fast.distributed import Ranks
from mts_fast.hypergradient import LabelledBatch, Objective
from mts_fast.hypergradient.engine import dense
from mts_fast.training.batch import CheckedValidation
from mts_fast.training.gradient_scaling import GradientScaling

# ways to combine the losses of the validation samples into L_val
VALIDATION_OBJECTIVES = ("mean", "group_balanced", "worst_group")


@dataclass(frozen=True)
class VirtualClassifier:
    """The model at theta', as the validation loss sees it.

    BatchNorm uses the current running statistics, or in train mode those of each micro-batch; the
    running statistics do not change.
    """

    objective: Objective  # with the loss of the validation samples
    parameters: Sequence[Tensor]
    theta: Sequence[Tensor]
    train_mode: bool
    micro_batch: int | None = None  # how many samples are run at a time

    @contextmanager
    def _put(self) -> Iterator[None]:
        """Inside, the model is that one."""
        world = self.objective.world
        with (
            training_mode(world, self.train_mode),
            preserved_buffers(world),
            self.objective.replaced(self.parameters, self.theta),
        ):
            yield

    def _parts(self, batch: CheckedValidation) -> list[LabelledBatch]:
        """None for an empty shard."""
        return batch.split(self.micro_batch) if len(batch) else []

    def shares(self, ranks: Ranks, batch: CheckedValidation, objective_name: str) -> Tensor | None:
        """The shares [V] of all samples where they depend on losses that `gradient` does not see
        together: then by a pass under the dropout masks that `gradient` will draw."""
        parts = self._parts(batch)
        if objective_name != "worst_group" or (len(parts) == 1 and ranks.size == 1):
            return None

        def losses() -> list[Tensor]:
            world = self.objective.world
            with self._put(), torch.no_grad(), preserved_rng(world):
                computed = [self.objective.losses(part) for part in parts]
                return [torch.cat(computed) if parts else batch.labels.new_empty(0)]

        (of_all,) = ranks.rows("validation losses", batch.shard, losses)
        return shares(batch, of_all, objective_name)

    def gradient(
        self,
        batch: CheckedValidation,
        objective_name: str,
        q: Tensor | None,
        scaling: GradientScaling,
    ) -> tuple[list[Tensor | None], Tensor]:
        """This rank's part of the gradient of L_val per parameter, and of L_val [].

        L_val = sum_i q_i l_i with the shares q of `shares`. The generators advance where the model
        draws from them.
        """
        total = None
        v: list[Tensor | None] = [None] * len(self.parameters)
        with self._put():
            start = 0
            for part in self._parts(batch):
                losses = self.objective.losses(part)
                if q is None:
                    q = shares(batch, losses.detach(), objective_name)
                mine = batch.shard.mine(q)
                share = mine[start : start + len(part)]
                start += len(part)
                scaled_gradients = self.objective.gradients(
                    losses, self.parameters, scaling.scaled(share).to(losses.dtype)
                )
                gradients = scaling.unscaled(dense(scaled_gradients))
                v = [_sum(old, g) for old, g in zip(v, gradients, strict=True)]
                total = _sum(total, (share * losses.detach()).sum())
        return v, batch.labels.new_zeros((), dtype=torch.float32) if total is None else total


def shares(batch: CheckedValidation, losses: Tensor, objective_name: str) -> Tensor:
    """The share q_i [V] of each validation sample in L_val; they sum to 1.

    "mean": proportional to the samples' weights. "group_balanced": the same within each group, and
    every group that occurs counts alike. "worst_group": the group of the largest (weighted) mean
    loss alone, whose gradient is a subgradient of the maximum over groups. `losses` must be of
    all samples of all ranks for "worst_group", and may be of any part of them otherwise.
    """
    total = batch.shard.total
    if objective_name == "mean" and batch.weights is None:
        return losses.new_full((total,), 1 / total)
    weights = losses.new_ones(total) if batch.weights is None else batch.weights.to(losses.dtype)
    if objective_name == "mean":
        return weights / weights.sum()
    groups = batch.groups
    assert groups is not None
    size = len(groups)  # groups are renumbered, so that there are at most V of them
    sums = weights.new_zeros(size).index_add_(0, groups, weights)
    within = weights / sums.clamp(min=torch.finfo(weights.dtype).tiny)[groups]
    if objective_name == "group_balanced":
        return within / (sums > 0).sum()
    means = losses.new_zeros(size).index_add_(0, groups, within * losses)
    worst = means.masked_fill(sums == 0, -torch.inf).argmax()
    return within * (groups == worst)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b
