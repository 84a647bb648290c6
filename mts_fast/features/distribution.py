"""Distribution features of a pool of embeddings, in memory O(N K), never N x N."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from mts_fast._check import check_finite, check_floating
from mts_fast.features.columns import Columns
from mts_fast.features.pool_checks import BAD_ROWS, OP
from mts_fast.features.pool_rows import EmbeddingSource
from mts_fast.features.search import Approximate
from mts_fast.features.sweep import CHUNK, DistributionSweep


def distribution_features(
    embeddings: Tensor | np.ndarray | EmbeddingSource,
    labels: Tensor,
    is_synthetic: Tensor,
    *,
    k: int = 3,
    neighbors: int = 5,
    small_class: str = "error",
    chunk: int = CHUNK,
    search: str | Approximate = "exact",
) -> Columns:
    """Where each sample lies in its class's real and synthetic distributions.

    Args:
        embeddings: [N, D], from any encoder; floating point, finite; a tensor, a numpy array
            (memory-mapped, too), or what `open_embeddings` returns. Half precision is computed in
            float32.
        labels: [N], integers >= 0.
        is_synthetic: [N], bool or 0/1.
        k: how many nearest samples of the class count, of each source.
        neighbors: K of the K-NN label agreement over the whole pool.
        small_class: "error", or "pad" where a class may have k or fewer samples of a source: the
            missing cosines repeat the last one found, and are 0 where there is none.
        chunk: rows compared at once; beside the result, memory grows with chunk * D.
        search: "exact" compares every pair of samples, which grows with N^2; "approximate" or
            `Approximate(...)` searches by faiss, an optional package, for pools where that is too
            much.

    Returns:
        columns by name, each [N, width]: real_centroid_cosine, synthetic_centroid_cosine,
        class_centroid_cosine, class_nearest_cosine, knn5_label_agreement,
        knn5_weighted_label_agreement and distance_to_median_percentile of width 1,
        real_nearest3_cosine and synthetic_nearest3_cosine of width k. The names keep their 3 and 5
        for other k and neighbors. Of an approximate search `columns.notes` has for each column that
        comes from neighbours its recall and mean absolute error, measured on a sample.

    Raises:
        TypeError, ValueError: wrong dtypes, shapes or lengths, NaN or infinite embeddings (with
            the rows), a class without real samples, k not below a class size, neighbors >= N.
        ModuleNotFoundError: an approximate search without faiss.

    Notes:
        Cosine similarity; a zero vector has cosine 0 to everything. Self is excluded. Ties go to
        the lowest index. Each pair is compared once. The result does not depend on `chunk`, beyond
        rounding where the reference runs. To stop and resume: `DistributionSweep`.
        Approximate: centroids and percentiles are exact, so are the cosines of neighbours that are
        reached, and classes of fewer than `exact_below` samples; the rest comes with its recall,
        and a warning where that is below what was asked for. Equal seeds give equal results on one
        machine and number of threads.

    Source: docs/algorithm.md, features: distribution group.

    Example:
        >>> import torch, mts_fast
        >>> x = torch.randn(40, 8)
        >>> y, s = torch.arange(40) % 2, torch.arange(40) % 4 < 2
        >>> mts_fast.features.distribution_features(x, y, s)["real_nearest3_cosine"].shape
        torch.Size([40, 3])
    """
    if isinstance(embeddings, Tensor):
        check_floating(OP, "embeddings", embeddings, ndim=2)
        check_finite(OP, "embeddings", embeddings, BAD_ROWS)
    sweep = DistributionSweep(
        embeddings,
        labels,
        is_synthetic,
        k=k,
        neighbors=neighbors,
        small_class=small_class,
        chunk=chunk,
        search=search,
    )
    for _ in sweep.run():
        pass
    return sweep.columns()
