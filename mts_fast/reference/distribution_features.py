"""Offline features of a pool of embeddings, with full N x N matrices: the readable truth."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mts_fast.reference.label_agreement import label_agreement

# cosines stay in [-1, 1]; a self-similarity of -2 never wins.
EXCLUDED = -2.0


@dataclass(frozen=True)
class NeighborStatistics:
    """Of n samples: top cosines within their class, and their neighbours in the whole pool."""

    real: Tensor  # [n, k], descending cosines to real samples of the class
    synthetic: Tensor  # [n, k], to synthetic ones
    closest: Tensor  # [n, 1], to any
    similarity: Tensor  # [n, K], to the nearest of the whole pool
    index: Tensor  # [n, K], which these are


def neighbor_statistics(
    unit: Tensor,
    labels: Tensor,
    is_synthetic: Tensor,
    rows: Tensor,
    *,
    k: int,
    neighbors: int,
) -> NeighborStatistics:
    """Statistics of the samples `rows` [n] against all of unit [N, D], self excluded.

    Where a class has fewer than k other samples of a source, the missing places hold the last
    cosine found, or 0 where there is none.
    """
    similarity = unit[rows] @ unit.T  # [n, N]
    similarity[torch.arange(len(rows), device=unit.device), rows] = EXCLUDED
    same_class = labels[rows, None] == labels[None, :]  # [n, N]

    def nearest(allowed: Tensor, count: int) -> Tensor:
        masked = similarity.masked_fill(~allowed, EXCLUDED)
        return pad_cosines(masked.topk(min(count, len(unit)), dim=1).values, count)

    return NeighborStatistics(
        nearest(same_class & ~is_synthetic, k),
        nearest(same_class & is_synthetic, k),
        nearest(same_class, 1),
        *top_neighbors(similarity, neighbors),
    )


def distribution_features(
    embeddings: Tensor, labels: Tensor, is_synthetic: Tensor, *, k: int = 3, neighbors: int = 5
) -> dict[str, Tensor]:
    """Every distribution feature, each [N, width]: embeddings [N, D], labels and flags [N]."""
    everyone = torch.arange(len(labels), device=labels.device)
    unit = F.normalize(embeddings, dim=1)  # [N, D]; a zero vector stays zero: cosine 0 to all
    found = neighbor_statistics(unit, labels, is_synthetic, everyone, k=k, neighbors=neighbors)
    agreement = label_agreement(found.similarity, found.index, labels)
    return feature_columns(embeddings, labels, is_synthetic, found, agreement)


def feature_columns(
    embeddings: Tensor,
    labels: Tensor,
    is_synthetic: Tensor,
    found: NeighborStatistics,
    agreement: tuple[Tensor, Tensor],
) -> dict[str, Tensor]:
    """The features by name, from the neighbour statistics of the whole pool and their agreement."""
    everyone = torch.ones_like(is_synthetic)
    return {
        "real_centroid_cosine": centroid_cosine(embeddings, labels, ~is_synthetic),
        "synthetic_centroid_cosine": centroid_cosine(embeddings, labels, is_synthetic),
        "real_nearest3_cosine": found.real,
        "synthetic_nearest3_cosine": found.synthetic,
        "knn5_label_agreement": agreement[0][:, None],
        "knn5_weighted_label_agreement": agreement[1][:, None],
        "class_centroid_cosine": centroid_cosine(embeddings, labels, everyone),
        "class_nearest_cosine": found.closest,
        "distance_to_median_percentile": distance_to_median_percentile(embeddings, labels),
    }


def top_neighbors(similarity: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row [N, M] with their indices, ties to the lowest index."""
    values, index = similarity.sort(dim=1, descending=True, stable=True)
    return values[:, :count], index[:, :count]


def pad_cosines(found: Tensor, k: int) -> Tensor:
    """[N, <=k] sorted cosines with EXCLUDED in the empty places -> [N, k] without."""
    if found.shape[1] < k:
        found = F.pad(found, (0, k - found.shape[1]), value=EXCLUDED)
    present = found > EXCLUDED
    last = present.sum(1, keepdim=True).clamp(min=1) - 1
    filled = torch.where(present, found, found.gather(1, last))
    return filled.masked_fill(~present.any(1, keepdim=True), 0.0)


def centroid_cosine(embeddings: Tensor, labels: Tensor, chosen: Tensor) -> Tensor:
    """Cosine [N, 1] to the mean embedding of the chosen samples of one's class; 0 without any."""
    classes = int(labels.max()) + 1
    centroids = embeddings.new_zeros(classes, embeddings.shape[1])
    centroids.index_add_(0, labels[chosen], embeddings[chosen])
    counts = torch.bincount(labels[chosen], minlength=classes).clamp(min=1)
    means = (centroids / counts[:, None])[labels]  # [N, D]
    return (F.normalize(embeddings, dim=1) * F.normalize(means, dim=1)).sum(1, keepdim=True)


def distance_to_median_percentile(embeddings: Tensor, labels: Tensor) -> Tensor:
    """Rank [N, 1] in [0, 1] within the class of |distance to the class mean - its lower median|."""
    out = embeddings.new_zeros(len(labels), 1)
    for c in labels.unique().tolist():
        rows = (labels == c).nonzero().flatten()
        members = embeddings[rows]
        distance = (members - members.mean(0)).norm(dim=1)
        out[rows, 0] = percentile_rank((distance - distance.median()).abs())
    return out


def percentile_rank(values: Tensor) -> Tensor:
    """rank / (n - 1) [n], ascending, ties in order of index; 0 for a single value."""
    rank = torch.empty_like(values)
    order = values.argsort(stable=True)
    rank[order] = torch.arange(len(values), dtype=values.dtype, device=values.device)
    return rank / max(len(values) - 1, 1)
