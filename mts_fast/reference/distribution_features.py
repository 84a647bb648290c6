"""Offline features of a pool of embeddings: where a sample lies in its class's distributions."""

from __future__ import annotations

import torch
from torch import Tensor

from mts_fast.reference.class_centroids import ClassCentroids, class_centroids_
from mts_fast.reference.label_agreement import label_agreement
from mts_fast.reference.neighbor_statistics import NeighborStatistics, neighbor_statistics
from mts_fast.reference.percentile_rank import class_median, percentile_rank
from mts_fast.reference.unit_rows import power_of_two, unit_rows

REAL, SYNTHETIC, BOTH = slice(0, 1), slice(1, 2), slice(0, 2)


def distribution_features(
    embeddings: Tensor, labels: Tensor, is_synthetic: Tensor, *, k: int = 3, neighbors: int = 5
) -> dict[str, Tensor]:
    """Every distribution feature, each [N, width]: embeddings [N, D], labels and flags [N]."""
    unit = unit_rows(embeddings)  # [N, D]; a zero vector stays zero: cosine 0 to all
    nearest = neighbor_statistics(unit, labels, is_synthetic, k=k, neighbors=neighbors)
    agreement = label_agreement(nearest.similarity, nearest.index, labels)
    num_classes = int(labels.max()) + 1
    centroids = ClassCentroids.empty(num_classes, embeddings.shape[1], embeddings.device)
    class_centroids_(centroids, embeddings, labels, is_synthetic)
    cosines, distance = centroid_distances(embeddings, labels, centroids)
    gap = (distance - class_median(distance, labels)).abs()
    rank = percentile_rank(gap, labels).to(embeddings.dtype)
    return feature_columns(nearest, agreement, cosines, rank)


def centroid_distances(
    embeddings: Tensor, labels: Tensor, centroids: ClassCentroids
) -> tuple[Tensor, Tensor]:
    """(cosines [n, 3], distance [n]) of embeddings [n, D]: cosines to the real, synthetic and joint
    centroid of one's class, 0 without one; distance to the joint one, in float64."""
    unit = unit_rows(embeddings)
    means = [centroids.mean(sources) for sources in (REAL, SYNTHETIC, BOTH)]  # [C, D] each
    cosines = [
        (unit * unit_rows(mean).to(unit.dtype)[labels]).sum(1, keepdim=True) for mean in means
    ]
    center = means[-1].to(embeddings.dtype)[labels]  # [n, D]
    # scaled, so that neither differences nor their squares overflow or vanish
    scale = power_of_two(torch.maximum(embeddings.abs(), center.abs()).amax(1, keepdim=True))
    distance = (embeddings / scale - center / scale).norm(dim=1).double() * scale[:, 0]
    return torch.cat(cosines, dim=1), distance


def feature_columns(
    nearest: NeighborStatistics,
    agreement: tuple[Tensor, Tensor],
    centroid_cosines: Tensor,
    percentile: Tensor,
) -> dict[str, Tensor]:
    """The features by name, each [N, width], from their parts."""
    real, synthetic, joint = centroid_cosines.split(1, dim=1)
    return {
        "real_centroid_cosine": real,
        "synthetic_centroid_cosine": synthetic,
        "real_nearest3_cosine": nearest.real,
        "synthetic_nearest3_cosine": nearest.synthetic,
        "knn5_label_agreement": agreement[0][:, None],
        "knn5_weighted_label_agreement": agreement[1][:, None],
        "class_centroid_cosine": joint,
        "class_nearest_cosine": nearest.closest,
        "distance_to_median_percentile": percentile[:, None],
    }
