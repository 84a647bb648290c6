"""Sums of embeddings by class and source, and the centroids that follow."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ClassCentroids:
    """Sums over samples seen so far; float64, so that large classes keep their digits."""

    sums: Tensor  # [2, C, D] float64: of real and of synthetic samples
    counts: Tensor  # [2, C] int64

    @classmethod
    def empty(cls, num_classes: int, dimension: int, device: torch.device) -> ClassCentroids:
        """Before any sample was seen."""
        return cls(
            torch.zeros(2, num_classes, dimension, dtype=torch.float64, device=device),
            torch.zeros(2, num_classes, dtype=torch.int64, device=device),
        )

    def mean(self, sources: slice) -> Tensor:
        """[C, D]: mean embedding over sources [0:1] real, [1:2] synthetic or [0:2] both; 0
        without any sample."""
        counts = self.counts[sources].sum(0).clamp(min=1)
        return self.sums[sources].sum(0) / counts[:, None]


def class_centroids_(
    centroids: ClassCentroids, embeddings: Tensor, labels: Tensor, is_synthetic: Tensor
) -> None:
    """Add embeddings [n, D] of classes labels [n] and sources is_synthetic [n], in place."""
    num_classes = centroids.counts.shape[1]
    group = labels + num_classes * is_synthetic  # [n], a row of [2 C, D]
    centroids.sums.flatten(0, 1).index_add_(0, group, embeddings.double())
    centroids.counts.view(-1).add_(torch.bincount(group, minlength=2 * num_classes))
