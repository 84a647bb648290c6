"""class_centroids: contract, validation and dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from mts_fast import reference
from mts_fast._check import check_device, check_floating, check_pool, check_range, fail
from mts_fast.backends.cpp import class_centroids as cpp
from mts_fast.backends.cpp.eligibility import reasons_against_cpp
from mts_fast.backends.registry import register, resolve
from mts_fast.reference.class_centroids import ClassCentroids

OP = "class_centroids"

register(OP, "reference", reference.class_centroids_)
register(OP, "cpp", cpp.class_centroids_, reasons_against_cpp, devices=("cpu", "cuda"))


def class_centroids_(
    centroids: ClassCentroids, embeddings: Tensor, labels: Tensor, is_synthetic: Tensor
) -> None:
    """Add a chunk of a pool to the sums of its classes and sources, in place.

    Args:
        centroids: of C classes in D dimensions, from `ClassCentroids.empty`.
        embeddings: [n, D], floating point. They are summed in float64, in order of index.
        labels: [n], integers in [0, C).
        is_synthetic: [n], bool or 0/1.

    Raises:
        TypeError, ValueError: wrong dtypes, shapes or lengths, or a label outside [0, C).
        RuntimeError: an explicit backend that cannot run.

    Source: docs/algorithm.md, features: distribution group (centroid cosines).

    Example:
        >>> import torch
        >>> from mts_fast.ops import ClassCentroids, class_centroids_
        >>> centroids = ClassCentroids.empty(1, 2, torch.device("cpu"))
        >>> class_centroids_(centroids, torch.eye(2), torch.zeros(2).long(), torch.zeros(2).bool())
        >>> centroids.mean(slice(0, 1)).tolist()
        [[0.5, 0.5]]
    """
    check_floating(OP, "embeddings", embeddings, ndim=2)
    if embeddings.shape[1] != centroids.sums.shape[2]:
        expected = f"[n, {centroids.sums.shape[2]}], as the centroids are"
        hint = "make the centroids with ClassCentroids.empty(C, D, device)"
        fail(ValueError, OP, "embeddings", expected, tuple(embeddings.shape), hint)
    labels, synthetic = check_pool(OP, labels, is_synthetic, len(embeddings))
    for name, value in (("labels", labels), ("is_synthetic", synthetic)):
        check_device(OP, name, value, embeddings.device, "embeddings")
    hint = "make the centroids of that many classes"
    check_range(OP, "labels", labels, 0, centroids.counts.shape[1], hint)
    if embeddings.dtype not in (torch.float32, torch.float64):
        embeddings = embeddings.float()
    run = resolve(OP, [embeddings, labels, synthetic])
    run(centroids, embeddings.detach(), labels, synthetic)
