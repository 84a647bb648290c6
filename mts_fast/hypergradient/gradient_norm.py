"""Norms of every sample's gradient, by whatever route serves the model."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from mts_fast.hypergradient.ghost import Ghost, Unsupported
from mts_fast.hypergradient.ghost.sample_norms import gradient_norms
from mts_fast.hypergradient.objective import LabelledBatch, Objective

logger = logging.getLogger("mts_fast")


class GradientNorm:
    """||grad l_i|| [B] by all trainable parameters of an objective's model.

    By layer inputs and output gradients where the ghost engine serves the model, else one sample
    at a time, which is said once at INFO.
    """

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self._parameters = [p for p in objective.model.parameters() if p.requires_grad]
        self._ghost: Ghost | None = Ghost(self._objective, self._parameters)

    def __call__(self, batch: LabelledBatch) -> Tensor:
        """Norms [B]; the model in its present mode."""
        if self._ghost is not None:
            try:
                return gradient_norms(self._ghost, batch)
            except Unsupported as refused:
                self._ghost = None
                why = "; ".join(refused.reasons)
                logger.info("gradient norms: one sample at a time, since ghost cannot: %s", why)
        return torch.stack([self._of_one(one) for one in batch.split(1)])

    def _of_one(self, one: LabelledBatch) -> Tensor:
        loss = self._objective.losses(one).sum()
        gradient = torch.autograd.grad(loss, self._parameters, allow_unused=True)
        return torch.stack(torch._foreach_norm([g for g in gradient if g is not None])).norm()
