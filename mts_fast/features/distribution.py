"""Distribution features of a pool, in blocks: memory O(block * N), never N x N."""

from __future__ import annotations

from dataclasses import fields

import torch
import torch.nn.functional as F
from torch import Tensor

from mts_fast._check import (
    check_choice,
    check_finite,
    check_flags,
    check_floating,
    check_integer,
    check_length,
    check_positive_int,
    check_range,
    fail,
)
from mts_fast.ops.label_agreement import label_agreement
from mts_fast.reference.distribution_features import (
    NeighborStatistics,
    feature_columns,
    neighbor_statistics,
)

OP = "distribution_features"
# rows of the similarity matrix held at once: 1024 x 64k float32 is 256 MB.
BLOCK = 1024


def distribution_features(
    embeddings: Tensor,
    labels: Tensor,
    is_synthetic: Tensor,
    *,
    k: int = 3,
    neighbors: int = 5,
    small_class: str = "error",
    block: int = BLOCK,
) -> dict[str, Tensor]:
    """Where each sample lies in its class's real and synthetic distributions.

    Args:
        embeddings: [N, D], from any encoder; floating point, finite. Half precision is computed
            in float32.
        labels: [N], integers >= 0.
        is_synthetic: [N], bool or 0/1.
        k: how many nearest samples of the class count, of each source.
        neighbors: K of the K-NN label agreement over the whole pool.
        small_class: "error", or "pad" where a class may have k or fewer samples of a source: the
            missing cosines repeat the last one found, and are 0 where there is none.
        block: rows computed at once; memory grows with block * N.

    Returns:
        columns by name, each [N, width]: real_centroid_cosine, synthetic_centroid_cosine,
        class_centroid_cosine, class_nearest_cosine, knn5_label_agreement,
        knn5_weighted_label_agreement and distance_to_median_percentile of width 1,
        real_nearest3_cosine and synthetic_nearest3_cosine of width k. The names keep their 3 and 5
        for other k and neighbors.

    Raises:
        TypeError, ValueError: wrong dtypes, shapes or lengths, NaN or infinite embeddings (with
            the rows), a class without real samples, k larger than a class, neighbors >= N.

    Notes:
        Cosine similarity; a zero vector has cosine 0 to everything. Self is excluded. Ties go to
        the lowest index. The result does not depend on `block` beyond rounding.

    Source: feature table, distribution group.

    Example:
        >>> import torch, mts_fast
        >>> x = torch.randn(40, 8)
        >>> y, s = torch.arange(40) % 2, torch.arange(40) % 4 < 2
        >>> mts_fast.features.distribution_features(x, y, s)["real_nearest3_cosine"].shape
        torch.Size([40, 3])
    """
    embeddings, labels, synthetic = _validate(
        embeddings, labels, is_synthetic, k, neighbors, small_class, block
    )
    unit = F.normalize(embeddings, dim=1)
    parts = [
        neighbor_statistics(unit, labels, synthetic, rows, k=k, neighbors=neighbors)
        for rows in torch.arange(len(unit), device=unit.device).split(block)
    ]
    found = NeighborStatistics(
        *(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(NeighborStatistics))
    )
    agreement = label_agreement(found.similarity, found.index, labels)
    return feature_columns(embeddings, labels, synthetic, found, agreement)


def _validate(
    embeddings: Tensor,
    labels: Tensor,
    is_synthetic: Tensor,
    k: int,
    neighbors: int,
    small_class: str,
    block: int,
) -> tuple[Tensor, Tensor, Tensor]:
    check_floating(OP, "embeddings", embeddings, ndim=2)
    check_integer(OP, "labels", labels, ndim=1)
    check_length(OP, "labels", labels, len(embeddings))
    synthetic = check_flags(OP, "is_synthetic", is_synthetic, len(embeddings))
    for name, value in (("k", k), ("neighbors", neighbors), ("block", block)):
        check_positive_int(OP, name, value)
    check_choice(OP, "small_class", small_class, ("error", "pad"))
    if neighbors >= len(embeddings):
        fail(ValueError, OP, "neighbors", f"below the pool size {len(embeddings)}", neighbors)
    check_finite(OP, "embeddings", embeddings, "drop or repair these rows")
    labels = labels.long()
    classes = int(labels.max()) + 1
    check_range(OP, "labels", labels, 0, classes, "number the classes from 0")
    if small_class == "error":
        _check_class_sizes(labels, synthetic, classes, k)
    if embeddings.dtype not in (torch.float32, torch.float64):
        embeddings = embeddings.float()
    return embeddings, labels, synthetic


def _check_class_sizes(labels: Tensor, synthetic: Tensor, classes: int, k: int) -> None:
    """Every class needs k others of each source that it or its opposite could ask for."""
    total = torch.bincount(labels, minlength=classes)
    hint = "pass small_class='pad' to accept this"
    for source, chosen in (("real", ~synthetic), ("synthetic", synthetic)):
        count = torch.bincount(labels[chosen], minlength=classes)
        empty = ((count == 0) & (total > 0)).nonzero().flatten().tolist()
        if empty:
            expected = f"such that every class has {source} samples"
            fail(ValueError, OP, "is_synthetic", expected, f"none in classes {empty[:5]}", hint)
        small = ((count <= k) & (total > 0)).nonzero().flatten().tolist()
        if small:
            sizes = [int(count[c]) for c in small[:5]]
            expected = f"below the {source} samples of every class"
            fail(ValueError, OP, "k", expected, f"{k} with {sizes} in classes {small[:5]}", hint)
