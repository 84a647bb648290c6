"""neighbor_statistics: contract, validation and dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from mts_fast import reference
from mts_fast._check import (
    check_device,
    check_finite,
    check_floating,
    check_pool,
    check_positive_int,
    fail,
)
from mts_fast.backends.cpp import neighbor_statistics as cpp
from mts_fast.backends.cpp.eligibility import reasons_against_cpp
from mts_fast.backends.registry import register, resolve
from mts_fast.reference.neighbor_statistics import (
    NeighborChunk,
    NeighborLists,
    NeighborStatistics,
)

OP = "neighbor_statistics"

register(OP, "reference", reference.neighbor_statistics_)
register(OP, "cpp", cpp.neighbor_statistics_, reasons_against_cpp, devices=("cpu", "cuda"))


def neighbor_statistics_(
    lists: NeighborLists, rows: NeighborChunk, columns: NeighborChunk, *, tile: int | None = None
) -> None:
    """Offer every pair of two chunks of a pool to the lists of both its samples, in place.

    Called once for every pair of chunks, in any order, it fills the lists of a pool that need not
    fit in memory; the lists do not depend on the chunks, the tiles or the threads beyond the
    rounding of a matrix product, and not at all where the kernel is C++.

    Args:
        lists: of the whole pool; contiguous, of the chunks' dtype.
        rows: unit rows [n, D] with their labels [n] int64 >= 0 and flags [n] bool.
        columns: another chunk [m, D], or the same.
        tile: samples per side of the blocks of similarities held at once; None: what the backend
            measured best.

    Raises:
        TypeError, ValueError: chunks that overlap, or do not fit the lists or one another.
        RuntimeError: an explicit backend that cannot run.
    """
    for name, chunk in (("rows", rows), ("columns", columns)):
        size = len(chunk.unit)
        if chunk.unit.dtype != lists.similarity.dtype or chunk.unit.shape[1] != rows.unit.shape[1]:
            got = f"{chunk.unit.dtype} [n, {chunk.unit.shape[1]}]"
            expected = f"{lists.similarity.dtype} [n, {rows.unit.shape[1]}]"
            hint = "make all chunks and lists of one pool"
            fail(TypeError, OP, f"{name}.unit", expected, got, hint)
        if chunk.start < 0 or chunk.start + size > len(lists.index):
            expected = f"within the lists of {len(lists.index)}"
            got = f"samples {chunk.start} to {chunk.start + size}"
            fail(ValueError, OP, name, expected, got, "make the lists of the whole pool")
    first, second = sorted((rows, columns), key=lambda chunk: chunk.start)
    if first.start + len(first.unit) > second.start and (
        first.start != second.start or len(first.unit) != len(second.unit)
    ):
        expected = "the same samples as rows, or none of them"
        hint = "cut the pool into chunks once"
        fail(ValueError, OP, "columns", expected, f"overlapping from {second.start}", hint)
    if tile is not None:
        check_positive_int(OP, "tile", tile)
    if len(rows.unit) == 0 or len(columns.unit) == 0:
        return
    if not all(t.is_contiguous() for t in vars(lists).values()):
        fail(ValueError, OP, "lists", "contiguous", "strided lists", "use NeighborLists.empty")
    resolve(OP, [rows.unit, columns.unit, *vars(lists).values()])(lists, rows, columns, tile)


def neighbor_statistics(
    embeddings: Tensor,
    labels: Tensor,
    is_synthetic: Tensor,
    *,
    k: int = 3,
    neighbors: int = 5,
    tile: int | None = None,
) -> NeighborStatistics:
    """Nearest neighbours of every sample, by cosine: in its class by source, and in the pool.

    Args:
        embeddings: [N, D], floating point, finite; half precision is computed in float32. Rows
            need not have unit length; a zero row has cosine 0 to everything.
        labels: [N], integers >= 0.
        is_synthetic: [N], bool or 0/1.
        k: how many nearest samples of the class are kept, of each source.
        neighbors: K, how many of the whole pool, with their indices; below N.
        tile: as in `neighbor_statistics_`.

    Returns:
        NeighborStatistics: real [N, k], synthetic [N, k], closest [N, 1] cosines within the class,
        similarity [N, K] and index [N, K] over the pool; descending, self excluded, ties to the
        lowest index. Where a class has fewer than k other samples of a source, the missing places
        repeat the last cosine, and are 0 where there is none.

    Raises:
        TypeError, ValueError: wrong dtypes, shapes or lengths, NaN or infinity (with the rows).
        RuntimeError: an explicit backend that cannot run.

    Notes:
        Each pair's cosine is computed once and serves both samples; memory is O(N (D + K)).
        C++: sums of products in the embeddings' dtype, the same bits for any tile and number of
        threads on one instruction set. CUDA: matrix products in torch's float32 precision, which
        is full unless TF32 was allowed (then cosines err by up to 1e-3).

    Source: docs/algorithm.md, features: distribution group.

    Example:
        >>> import torch
        >>> from mts_fast.ops import neighbor_statistics
        >>> x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> neighbor_statistics(x, torch.zeros(3).long(), torch.zeros(3).bool(), neighbors=1).index
        tensor([[1],
                [0],
                [0]])
    """
    check_floating(OP, "embeddings", embeddings, ndim=2)
    labels, synthetic = check_pool(OP, labels, is_synthetic, len(embeddings))
    for name, vector in (("labels", labels), ("is_synthetic", synthetic)):
        check_device(OP, name, vector, embeddings.device, "embeddings")
    for name, value in (("k", k), ("neighbors", neighbors)):
        check_positive_int(OP, name, value)
    if neighbors >= len(embeddings):
        hint = "a sample is no neighbour of itself"
        fail(ValueError, OP, "neighbors", f"below the pool size {len(embeddings)}", neighbors, hint)
    if k > len(embeddings):
        hint = "no class has more samples than the pool"
        fail(ValueError, OP, "k", f"at most the pool size {len(embeddings)}", k, hint)
    check_finite(OP, "embeddings", embeddings, "drop or repair these rows")
    if embeddings.dtype not in (torch.float32, torch.float64):
        embeddings = embeddings.float()
    pool = NeighborChunk(reference.unit_rows(embeddings.detach()), labels, synthetic, 0)
    lists = NeighborLists.empty(len(labels), k=k, neighbors=neighbors, like=pool.unit)
    neighbor_statistics_(lists, pool, pool, tile=tile)
    return lists.statistics()
