"""What one MTSStep leaves behind for logging. Every value is a tensor until you read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mts_fast.diagnostics import WeightStatistics, weight_statistics


@dataclass(frozen=True)
class StepResult:
    """Tensors of one step, detached. B is the training batch, B2 the selector's batch.

    val_loss, dots and self_check are None in a step that left the selector alone; self_check also
    where the selector had a batch of its own.
    """

    losses: Tensor  # [B], at the parameters before the step
    loss: Tensor  # [], sum of normalized_weights * losses: what the classifier descended
    logits: Tensor  # [B], the selector's outputs that the classifier's weights came from
    weights: Tensor  # [B], w: sigmoid(logits) times class weight
    normalized_weights: Tensor  # [B], p of the classifier's step; uniform during warm-up
    val_loss: Tensor | None  # [], mean validation loss at the virtual parameters
    dots: Tensor | None  # [B2], d_i = <kappa v, grad l_i>
    self_check: Tensor | None  # [], relative gap of sum_i p_i d_i = <kappa v, grad L>
    gsnr: Tensor | None  # [], of the selector's gradient; only with track_gsnr

    @property
    def statistics(self) -> WeightStatistics:
        """Concentration of the classifier's weights (the paper's Figure 2)."""
        return weight_statistics(self.weights, self.normalized_weights)


def invariant_gap(
    p: Tensor, dots: Tensor, gradient: Sequence[Tensor | None], direction: Sequence[Tensor]
) -> Tensor:
    """Relative gap [] of sum_i p_i d_i = <direction, gradient>; 0 where both sides are 0."""
    along = [(g * u).sum() for g, u in zip(gradient, direction, strict=True) if g is not None]
    found, expected = (p * dots).sum(), torch.stack(along).sum()
    scale = torch.maximum(found.abs(), expected.abs())
    return (found - expected).abs() / scale.clamp(min=torch.finfo(scale.dtype).tiny)
