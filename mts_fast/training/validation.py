"""Row 5: the gradient of the mean validation loss at other parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mts_fast._isolation import preserved_buffers, replaced_parameters, training_mode
from mts_fast.hypergradient import LabelledBatch, Objective


def validation_gradient(
    objective: Objective,
    parameters: Sequence[Tensor],
    theta: Sequence[Tensor],
    batch: LabelledBatch,
    *,
    train_mode: bool,
    micro_batch: int | None = None,
) -> tuple[Tensor, list[Tensor | None]]:
    """(mean loss [], its gradient per parameter) at theta', micro_batch samples at a time.

    BatchNorm uses the running statistics as they are now, or in train mode those of each
    micro-batch; they do not move. The generators do, where the model draws from them.
    """
    model = objective.model
    total = None
    v: list[Tensor | None] = [None] * len(parameters)
    with (
        training_mode(model, train_mode),
        preserved_buffers(model),
        replaced_parameters(parameters, theta),
    ):
        for part in batch.split(micro_batch):
            loss = objective.losses(part).sum() / len(batch)
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
            v = [_sum(old, g) for old, g in zip(v, found, strict=True)]
            total = _sum(total, loss.detach())
    assert total is not None
    return total, v


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b
