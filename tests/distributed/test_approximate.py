"""Approximate search of a pool that is spread over ranks."""

import pytest
import rank_features
import torch
from comparison import assert_bitwise
from rank_pool import SLOW
from searched_pools import clusters, cosines_within, share_reached

from mts_fast.features import distribution_features

pytest.importorskip("faiss")

OPTIONS = {"exact_below": 500, "queries": 800}
OF_NEIGHBORS = (
    *("real_nearest3_cosine", "synthetic_nearest3_cosine", "class_nearest_cosine"),
    *("knn5_label_agreement", "knn5_weighted_label_agreement"),
)


@pytest.mark.parametrize(
    "sizes",
    [
        (900, 0, 1100, 400),
        pytest.param((1500, 900), marks=SLOW),
        pytest.param((3, 2000, 397), marks=SLOW),
    ],
)
def test_columns_of_ranks(ranks, sizes):
    """What is exact in one process is that of one process; cosines are true ones; the recall is
    the same on all ranks, and what counting over the whole pool gives."""
    pool = clusters(sum(sizes))
    exact = distribution_features(*pool)
    results = ranks.results(rank_features.approximately, len(sizes), sizes, OPTIONS)
    columns = {name: torch.cat([part[name] for part, _ in results]) for name in exact}
    notes = results[0][1]
    for _, others in results:
        assert others == notes
    assert list(notes) == list(OF_NEIGHBORS)
    small = pool[1] == 2
    assert small.sum() < 500
    for name, column in exact.items():
        rows = small if "nearest" in name else slice(None)
        if name not in OF_NEIGHBORS or "nearest" in name:
            # sums of another order; observed 2e-7
            torch.testing.assert_close(columns[name][rows], column[rows], rtol=1e-5, atol=1e-6)
    for name, chosen in zip(OF_NEIGHBORS[:2], (~pool[2], pool[2]), strict=True):
        assert (columns[name] <= exact[name] + 1e-6).all()
        share = share_reached(columns[name], cosines_within(pool[0], pool[1], chosen), 3)
        # 1200 places of 400 queries: a standard error below 0.01
        assert share > 0.93 and abs(notes[name]["recall"] - share) < 0.03
        assert f"on {len(sizes)} ranks, nprobe" in notes[name]["search"]
    for name in OF_NEIGHBORS[3:]:
        assert (columns[name] - exact[name]).abs().mean() < 0.02
        assert notes[name]["recall"] > 0.9


def test_small_pools_are_exact_on_ranks(ranks):
    sizes = (300, 200)
    exact = distribution_features(*clusters(500))
    for rank, (columns, notes) in enumerate(
        ranks.results(rank_features.approximately, 2, sizes, {"exact_below": 501})
    ):
        assert notes == {n: {"search": "exact", "recall": 1.0} for n in OF_NEIGHBORS}
        for name, column in columns.items():
            expected = exact[name].split(sizes)[rank]
            torch.testing.assert_close(column, expected, rtol=1e-5, atol=1e-6)


def test_equal_seeds_give_equal_bits_on_ranks(ranks):
    first, second = (
        ranks.results(rank_features.approximately, 2, (700, 500), OPTIONS) for _ in range(2)
    )
    assert_bitwise(first, second)


def test_a_rank_without_faiss_and_options_that_differ_are_told_to_all(ranks):
    for rank, text in enumerate(ranks.results(rank_features.without_faiss, 2, (60, 60))):
        assert "search must be 'exact' without faiss" in text
        assert rank == 1 or "got ModuleNotFoundError on rank 1" in text
    for text in ranks.results(rank_features.other_seeds, 2, (60, 60)):
        assert "the options must be the same on every rank" in text
