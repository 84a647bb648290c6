"""class_centroids by the C++ and CUDA kernels: schemas, and the sorted order that a GPU needs."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mts_fast.reference.class_centroids import ClassCentroids

torch.library.define(
    "mts_fast::class_centroids_",
    "(Tensor embeddings, Tensor labels, Tensor is_synthetic, Tensor(a!) sums, Tensor(b!) counts)"
    " -> ()",
)


@torch.library.register_fake("mts_fast::class_centroids_")
def _fake(*_: Tensor) -> None:
    """Adds to sums and counts and returns nothing."""


# the op of a GPU: adds rows group by group, in the order of `order`.
torch.library.define(
    "mts_fast::sum_groups_",
    "(Tensor embeddings, Tensor order, Tensor offsets, Tensor(a!) sums) -> ()",
)


@torch.library.register_fake("mts_fast::sum_groups_")
def _fake_sum(*_: Tensor) -> None:
    """Adds to sums and returns nothing."""


def class_centroids_(
    centroids: ClassCentroids, embeddings: Tensor, labels: Tensor, is_synthetic: Tensor
) -> None:
    if embeddings.is_cuda:
        add_groups(torch.ops.mts_fast.sum_groups_, centroids, embeddings, labels, is_synthetic)
        return
    torch.ops.mts_fast.class_centroids_(
        embeddings, labels, is_synthetic, centroids.sums, centroids.counts
    )


def add_groups(
    add: Callable[..., None],
    centroids: ClassCentroids,
    embeddings: Tensor,
    labels: Tensor,
    is_synthetic: Tensor,
) -> None:
    """Add a chunk on a GPU: its samples are sorted by source and class, so that no sum needs an
    atomic."""
    group = labels + centroids.counts.shape[1] * is_synthetic
    counts = torch.bincount(group, minlength=centroids.counts.numel())
    offsets = F.pad(counts.cumsum(0), (1, 0))
    add(embeddings, group.argsort(stable=True), offsets, centroids.sums)
    centroids.counts.view(-1).add_(counts)
