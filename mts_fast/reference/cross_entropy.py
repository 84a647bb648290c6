"""Row 3: per-sample and weighted cross-entropy, for [B, C] logits and [B, T, C] sequences."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
) -> Tensor:
    """Per-sample cross-entropy [B] of logits [B, C] and labels [B].

    For sequences (logits [B, T, C], labels [B, T]) the loss of a sample is the mean over its
    positions that are not ignored. A sample with nothing but ignored labels has loss 0.
    """
    losses = F.cross_entropy(
        logits.flatten(0, -2),
        labels.flatten(),
        weight=class_weight,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        reduction="none",
    ).view(labels.shape)
    return mean_of_positions(losses, labels, ignore_index)


def mean_of_positions(losses: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """Losses of samples [B], from those or from losses of positions [B, T], 0 where ignored."""
    if labels.ndim == 1:
        return losses
    counted = (labels != ignore_index).flatten(1)
    return losses.flatten(1).sum(1) / counted.sum(1).clamp(min=1)


def weighted_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    p: Tensor,
    *,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """(L, l): L = sum_i p_i l_i [] and the per-sample losses l [B]."""
    losses = cross_entropy(
        logits,
        labels,
        class_weight=class_weight,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
    )
    return (p * losses).sum(), losses
