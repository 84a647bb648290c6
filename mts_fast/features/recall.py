"""What an approximate search misses: its lists beside exact ones, of a sample of queries."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from mts_fast.features.columns import Note
from mts_fast.features.pool_checks import OP
from mts_fast.features.pool_rows import PoolRows
from mts_fast.ops.neighbor_statistics import NeighborChunk, NeighborLists, neighbor_statistics_
from mts_fast.reference.label_agreement import label_agreement
from mts_fast.reference.neighbor_statistics import EXCLUDED, merge_lists

logger = logging.getLogger("mts_fast")
# cosines that differ by less are equal: sums of D products in another order; observed 2 eps
SAME_COSINE_EPS = 16
# column -> the lists that it comes from
LISTS = {
    "real_nearest3_cosine": "real",
    "synthetic_nearest3_cosine": "synthetic",
    "class_nearest_cosine": "closest",
    "knn5_label_agreement": "similarity",
    "knn5_weighted_label_agreement": "similarity",
}


def drawn_queries(size: int, count: int, seed: int) -> Tensor:
    """Numbers [count] of a sample of `size` samples, ascending; all where there are fewer."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(size, generator=generator)[:count].sort().values


def exact_lists(
    rows: PoolRows, queries: NeighborChunk, numbers: Tensor, *, k: int, neighbors: int
) -> NeighborLists:
    """Lists [q] of queries by comparing each with every one of `rows`, numbered as there.

    numbers [q]: those of the queries among `rows`, -1 for others.
    """
    size = len(queries.unit)
    first = replace(queries, start=0)
    # one place more than asked for: a query finds itself
    lists = NeighborLists.empty(size, k=k + 1, neighbors=neighbors + 1, like=queries.unit)
    for index in range(len(rows.starts)):
        chunk = rows.unit_chunk(index)
        both = NeighborLists.empty(
            size + len(chunk.unit), k=k + 1, neighbors=neighbors + 1, like=queries.unit
        )
        neighbor_statistics_(both, first, replace(chunk, start=size))
        part = NeighborLists(*(t[:size] for t in vars(both).values()))
        part.index.add_((chunk.start - size) * (part.similarity > EXCLUDED))
        merge_lists(lists, part, 0)
    return _without_self(lists, queries.is_synthetic, numbers, k, neighbors)


def _without_self(
    lists: NeighborLists, is_synthetic: Tensor, numbers: Tensor, k: int, neighbors: int
) -> NeighborLists:
    """Lists of k + 1 and K + 1 places without the sample itself. Among its class its cosine is the
    largest, or equal to it: 1, or 0 of a zero vector."""
    place = (lists.index == numbers[:, None]).int().argsort(dim=1, stable=True)[:, :neighbors]
    present = numbers >= 0

    def others(cosines: Tensor, of_source: Tensor) -> Tensor:
        shifted = (present & of_source)[:, None]
        return torch.where(shifted, cosines[:, 1:], cosines[:, :k])

    return NeighborLists(
        lists.similarity.gather(1, place),
        lists.index.gather(1, place),
        others(lists.real, ~is_synthetic),
        others(lists.synthetic, is_synthetic),
    )


def recall_of(
    lists: NeighborLists, exact: NeighborLists, in_class: Tensor | None = None
) -> dict[str, float]:
    """Share of the exact neighbours that the lists [q] have, by the name of the list.

    An entry counts where its cosine reaches the least exact one, so that equal cosines count alike.
    in_class [q]: queries whose lists within their class count; default all.
    """
    rows = slice(None) if in_class is None else in_class
    pairs = {"similarity": (lists.similarity, exact.similarity)}
    pairs |= {n: (getattr(lists, n)[rows], getattr(exact, n)[rows]) for n in ("real", "synthetic")}
    pairs["closest"] = (_closest(lists)[rows], _closest(exact)[rows])
    return {name: _share(*pair) for name, pair in pairs.items()}


def smallest(recall: Mapping[str, float]) -> float:
    """The least of the lists' recalls."""
    return min(recall.values())


def _closest(lists: NeighborLists) -> Tensor:
    return torch.maximum(lists.real[:, :1], lists.synthetic[:, :1])


def _share(cosines: Tensor, exact: Tensor) -> float:
    present = exact > EXCLUDED
    count = present.sum(1)
    if not count.any():
        return 1.0
    least = exact.masked_fill(~present, 2.0).amin(1, keepdim=True)
    reached = cosines >= least - SAME_COSINE_EPS * torch.finfo(exact.dtype).eps
    hits = torch.minimum((reached & (cosines > EXCLUDED)).sum(1), count)
    return float(hits.sum() / count.sum())


def search_notes(
    lists: NeighborLists, exact: NeighborLists, labels: Tensor, pool_labels: Tensor, search: str
) -> dict[str, Note]:
    """By column: the search, its recall and the mean absolute error on a sample of queries.

    labels [q] of the queries, pool_labels [N] by the lists' numbers.
    """
    recall = recall_of(lists, exact)
    values, truth = (_columns(each, labels, pool_labels) for each in (lists, exact))
    return {
        column: {
            "search": search,
            "recall": round(recall[name], 4),
            "mean_error": float(f"{(values[column] - truth[column]).abs().mean():.3g}"),
            "queries": len(labels),
        }
        for column, name in LISTS.items()
    }


def warn_of(notes: Mapping[str, Note], target: float) -> None:
    """Warn where a recall is below the target."""
    low = {column: note["recall"] for column, note in notes.items() if note["recall"] < target}  # type: ignore[operator]
    if low:
        logger.warning(
            "%s: recall must be %g or more, got %s; pass search=Approximate(...) with more"
            " candidates, nprobe or a larger exact_below",
            OP,
            target,
            low,
        )


def _columns(lists: NeighborLists, labels: Tensor, pool_labels: Tensor) -> dict[str, Tensor]:
    """The columns of LISTS of some queries."""
    nearest = lists.statistics()
    agreement = label_agreement(nearest.similarity, nearest.index, labels, pool_labels=pool_labels)
    values = (nearest.real, nearest.synthetic, nearest.closest, *agreement)
    return dict(zip(LISTS, values, strict=True))
