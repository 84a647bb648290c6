"""Distribution features of a pool that is spread over ranks: those of one process."""

import pytest
import rank_features
import torch
from rank_pool import SLOW

import mts_fast
from mts_fast.distributed import distribution_features

EXACT = {"rtol": 1e-12, "atol": 1e-12}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "sizes",
    [
        (31, 20, 25, 24),
        (40, 3),
        pytest.param((50, 50), marks=SLOW),
        pytest.param((40, 0, 30, 30), marks=SLOW),
        pytest.param((20, 41, 39), marks=SLOW),
        pytest.param((1, 60, 1, 1), marks=SLOW),
    ],
)
def test_columns_of_ranks_are_those_of_one_process(ranks, sizes, dtype):
    pool = rank_features.pool(sum(sizes), dtype)
    whole = mts_fast.features.distribution_features(*pool, small_class="pad")
    parts = ranks.results(rank_features.columns, len(sizes), sizes, dtype)
    tolerance = EXACT if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    for name, column in whole.items():
        joined = torch.cat([part[name] for part in parts])
        torch.testing.assert_close(joined, column, **tolerance, msg=lambda m, n=name: f"{n}: {m}")


def test_ties_go_to_the_lowest_number(ranks):
    sizes = (6, 6, 6, 6)
    whole = mts_fast.features.distribution_features(*rank_features.tied(24), neighbors=3)
    parts = ranks.results(rank_features.columns_of_ties, 4, sizes)
    for name, column in whole.items():
        torch.testing.assert_close(torch.cat([part[name] for part in parts]), column, **EXACT)


def test_one_process_is_the_function_itself():
    pool = rank_features.pool(40, torch.float64)
    for name, column in distribution_features(*pool, small_class="pad").items():
        expected = mts_fast.features.distribution_features(*pool, small_class="pad")[name]
        torch.testing.assert_close(column, expected, rtol=0, atol=0)


def test_errors_are_told_to_all(ranks):
    for rank, text in enumerate(ranks.results(rank_features.bad_rows, 3)):
        assert "embeddings must be finite" in text
        assert rank == 1 or "on rank 1" in text
    for text in ranks.results(rank_features.other_options, 3):
        assert "the options must be the same on every rank" in text
    for text in ranks.results(rank_features.small_classes, 3):
        assert "must be such that every class has real samples" in text
