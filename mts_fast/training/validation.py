"""Row 5: the gradient of the validation loss at other parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mts_fast._isolation import (
    preserved_buffers,
    preserved_rng,
    replaced_parameters,
    training_mode,
)
from mts_fast.hypergradient import Objective
from mts_fast.hypergradient.engine import dense
from mts_fast.training.batch import CheckedValidation
from mts_fast.training.gradient_scaling import GradientScaling

# ways to combine the losses of the validation samples into L_val
VALIDATION_OBJECTIVES = ("mean", "group_balanced", "worst_group")


def validation_gradient(
    objective: Objective,
    parameters: Sequence[Tensor],
    theta: Sequence[Tensor],
    batch: CheckedValidation,
    *,
    train_mode: bool,
    objective_name: str = "mean",
    micro_batch: int | None = None,
    scaling: GradientScaling,
) -> tuple[Tensor, list[Tensor | None]]:
    """(L_val [], its gradient per parameter) at theta', micro_batch samples at a time.

    L_val = sum_i q_i l_i with the shares q of `shares`. BatchNorm uses the current running
    statistics, or in train mode those of each micro-batch; the running statistics do not change.
    The generators advance where the model draws from them.
    """
    world = objective.world
    total = None
    v: list[Tensor | None] = [None] * len(parameters)
    parts = batch.split(micro_batch)
    with (
        training_mode(world, train_mode),
        preserved_buffers(world),
        replaced_parameters(parameters, theta),
    ):
        q = None
        if objective_name == "worst_group" and len(parts) > 1:
            # losses alone, under the dropout masks that the passes below will draw
            with torch.no_grad(), preserved_rng(world):
                q = shares(batch, torch.cat([objective.losses(p) for p in parts]), objective_name)
        start = 0
        for part in parts:
            losses = objective.losses(part)
            if q is None:
                q = shares(batch, losses.detach(), objective_name)
            loss = (q[start : start + len(part)] * losses).sum()
            start += len(part)
            scaled_loss = scaling.scaled(loss)
            scaled_gradients = torch.autograd.grad(scaled_loss, parameters, allow_unused=True)
            gradients = scaling.unscaled(dense(scaled_gradients))
            v = [_sum(old, g) for old, g in zip(v, gradients, strict=True)]
            total = _sum(total, loss.detach())
    assert total is not None
    return total, v


def shares(batch: CheckedValidation, losses: Tensor, objective_name: str) -> Tensor:
    """The share q_i [V] of each validation sample in L_val; they sum to 1.

    "mean": proportional to the samples' weights. "group_balanced": the same within each group, and
    every group that occurs counts alike. "worst_group": the group of the largest (weighted) mean
    loss alone, whose gradient is a subgradient of the maximum over groups. `losses` must be of
    all samples for "worst_group", and may be of any part of them otherwise.
    """
    weights = losses.new_ones(len(batch))
    if batch.weights is not None:
        weights = batch.weights.to(losses.dtype)
    if objective_name == "mean":
        return weights / weights.sum()
    groups = batch.groups
    assert groups is not None
    size = len(groups)  # groups are renumbered, so that there are at most V of them
    total = weights.new_zeros(size).index_add_(0, groups, weights)
    within = weights / total.clamp(min=torch.finfo(weights.dtype).tiny)[groups]
    if objective_name == "group_balanced":
        return within / (total > 0).sum()
    means = losses.new_zeros(size).index_add_(0, groups, within * losses)
    worst = means.masked_fill(total == 0, -torch.inf).argmax()
    return within * (groups == worst)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b
