"""Target: what a cross-entropy compares the logits with, as one value."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Target(NamedTuple):
    """Labels with the options of torch's cross-entropy; ops hand it to their implementations whole.

    The order of its fields is that of the same arguments in every schema.
    """

    labels: Tensor  # [B], or [B, T] for sequences; int64 once checked
    class_weight: Tensor | None = None  # [C], in any floating dtype
    label_smoothing: float = 0.0  # in [0, 1]
    ignore_index: int = -100

    def flat(self) -> Target:
        """With labels [M], of rows of logits [M, C]."""
        return self._replace(labels=self.labels.flatten())

    def mean_of_positions(self, losses: Tensor) -> Tensor:
        """Losses [B] of samples, from losses [B], or [B, T] of positions with 0 where ignored."""
        if self.labels.ndim == 1:
            return losses
        counted = (self.labels != self.ignore_index).flatten(1)
        return losses.flatten(1).sum(1) / counted.sum(1).clamp(min=1)
