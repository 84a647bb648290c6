"""Approximate search of distribution features against exact search and against counting."""

import logging
import sys

import numpy as np
import pytest
import torch
from comparison import assert_bitwise
from pools import POOLS
from searched_pools import clusters, cosines_within, share_reached

from mts_fast.features import Approximate, distribution_features

pytest.importorskip("faiss")

SIZE = 2400
POOL = clusters(SIZE)
# the last class stays exact
OPTIONS = {"exact_below": 500, "queries": 600}
NEAREST = ("real_nearest3_cosine", "synthetic_nearest3_cosine", "class_nearest_cosine")
OF_NEIGHBORS = (*NEAREST, "knn5_label_agreement", "knn5_weighted_label_agreement")


def searched(pool=POOL, **options):
    return distribution_features(*pool, search=Approximate(**OPTIONS | options))


@pytest.fixture(scope="module")
def exact():
    return distribution_features(*POOL)


@pytest.fixture(scope="module")
def approximate():
    return searched()


def test_what_does_not_come_from_neighbours_is_exact(exact, approximate):
    assert list(approximate) == list(exact)
    for name in set(exact) - set(OF_NEIGHBORS):
        assert_bitwise(approximate[name], exact[name])


@pytest.mark.parametrize(("name", "real"), [(NEAREST[0], True), (NEAREST[1], False)])
def test_cosines_are_true_ones_and_recall_is_what_is_reported(name, real, exact, approximate):
    """Recall over the whole pool by counting; on 300 queries its standard error is below 0.01."""
    x, labels, synthetic = POOL
    cosines = cosines_within(x, labels, synthetic != real)
    share = share_reached(approximate[name], cosines, 3)
    assert share_reached(exact[name], cosines, 3) == 1
    note = approximate.notes[name]
    assert note["queries"] == 300 and "nprobe" in note["search"]
    assert 0.93 < share < 1 and abs(note["recall"] - share) < 0.03
    gaps = np.abs(cosines[:, None] - approximate[name].double().numpy()[:, :, None])
    assert np.nanmin(gaps, axis=2).max() < 1e-6  # each value is a cosine of its class and source
    error = (approximate[name] - exact[name]).abs()
    assert note["mean_error"] == pytest.approx(error.mean().item(), rel=1, abs=1e-4)
    small = labels == 2
    assert small.sum() < 500
    torch.testing.assert_close(approximate[name][small], exact[name][small], rtol=0, atol=1e-6)


def test_agreement_errs_as_reported(exact, approximate):
    for name in OF_NEIGHBORS[3:]:
        error = (approximate[name] - exact[name]).abs().mean().item()
        assert 0 < error < 0.02
        assert approximate.notes[name]["mean_error"] == pytest.approx(error, abs=0.005)


def test_more_recall_is_reached_where_it_is_asked_for(exact):
    columns = searched(recall=0.999)
    for name in NEAREST:
        assert columns.notes[name]["recall"] >= 0.995
        # observed 1e-5
        assert (columns[name] - exact[name]).abs().mean() < 1e-4


def test_low_recall_is_warned_about(caplog):
    with caplog.at_level(logging.WARNING, "mts_fast"):
        columns = searched(nprobe=1, candidates=1, recall=0.9)
    note = columns.notes["knn5_label_agreement"]
    assert note["recall"] < 0.9 and note["search"] == "approximate, nprobe 1, candidates 1"
    low = columns.notes[NEAREST[0]]["recall"]
    said = f"recall must be 0.9 or more, got {{'real_nearest3_cosine': {low}"
    assert said in caplog.text
    assert all(column.isfinite().all() for column in columns.values())


def test_small_pools_are_exact():
    columns = distribution_features(*POOL, search="approximate")
    assert_bitwise(dict(columns), dict(distribution_features(*POOL)))
    assert columns.notes["class_nearest_cosine"] == {"search": "exact", "recall": 1.0}
    assert distribution_features(*POOL, search="exact").notes == {}


@pytest.mark.parametrize("make", POOLS)
def test_awkward_pools(make):
    """As many candidates as samples: only the order of equal cosines may differ."""
    x, y, s = make()
    options = {"small_class": "pad", "neighbors": 4}
    search = Approximate(exact_below=0, candidates=16, queries=20)
    columns = distribution_features(x, y, s, search=search, **options)
    expected = distribution_features(x, y, s, **options)
    for name in (*NEAREST, "distance_to_median_percentile"):
        torch.testing.assert_close(columns[name], expected[name], rtol=0, atol=1e-12, msg=name)
    assert columns.notes[NEAREST[0]]["recall"] == 1


def test_a_source_with_few_samples_is_not_missed():
    """4 real samples among 2400: their cosines stand in every row of their class."""
    x, y, s = clusters(SIZE, classes=2)
    y = y * 0
    s[:] = True
    s[torch.tensor([3, 500, 1400, 2399])] = False
    columns = distribution_features(x, y, s, search=Approximate(**OPTIONS, nprobe=1))
    exact = distribution_features(x, y, s)
    torch.testing.assert_close(
        columns["real_nearest3_cosine"], exact["real_nearest3_cosine"], rtol=0, atol=1e-6
    )


def test_outliers_have_all_their_neighbours():
    """A sample alone in its list, of which one list is looked through, still gets five."""
    x, y, s = clusters(SIZE)
    x[::100] = 50 * torch.randn(24, x.shape[1], generator=torch.Generator().manual_seed(0))
    columns = searched((x, y, s), nprobe=1, nlist=1000)
    assert columns["knn5_label_agreement"].isfinite().all()
    assert (columns["class_nearest_cosine"] > -1).all()


@pytest.mark.parametrize("factor", [2.0**-60, 2.0**60])
def test_lengths_do_not_matter(factor):
    x, y, s = POOL
    columns, expected = searched((x * factor, y, s)), searched()
    for name in OF_NEIGHBORS:
        torch.testing.assert_close(columns[name], expected[name], rtol=0, atol=1e-6)


def test_zero_vectors_and_duplicates():
    """Duplicates of a sample are its neighbours, itself is not; a zero vector has cosine 0."""
    x, y, s = clusters(SIZE)
    x[1300:2100] = x[500:1300]
    y[1300:2100], s[1300:2100] = y[500:1300], s[500:1300]
    x[:7] = 0
    columns = searched((x, y, s), recall=0.99)
    assert (columns["class_nearest_cosine"][500:2100] > 1 - 1e-5).float().mean() > 0.99
    assert (columns["class_nearest_cosine"][2100:] < 0.9999).all()
    exact = distribution_features(x, y, s)
    for name in OF_NEIGHBORS:  # ties of a zero vector go to the lowest numbers
        assert_bitwise(columns[name][:7], exact[name][:7])


def test_equal_seeds_give_equal_bits_and_no_generator_is_used():
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first, second, other = searched(), searched(), searched(seed=1)
    assert_bitwise(first, second)
    assert first.notes == second.notes
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert any(not torch.equal(first[name], other[name]) for name in OF_NEIGHBORS)


def test_threads_of_faiss_are_left_as_they_were():
    import faiss

    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(3)
    try:
        searched()
        assert faiss.omp_get_max_threads() == 3
    finally:
        faiss.omp_set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes(dtype):
    x, y, s = clusters(1500)
    columns = searched((x.to(dtype), y, s))
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    assert {column.dtype for column in columns.values()} == {computed}
    expected = searched((x.to(dtype).to(computed), y, s))
    assert_bitwise(columns, expected)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"recall": 0}, ValueError, "recall must be a finite number above 0 and at most 1"),
        ({"recall": "high"}, TypeError, "recall must be a finite number"),
        ({"queries": 1}, ValueError, "queries must be an int of 2 or more, got 1"),
        ({"nlist": 0}, ValueError, "nlist must be a positive int"),
        ({"nprobe": 1.5}, TypeError, "nprobe must be a positive int"),
        ({"candidates": -1}, ValueError, "candidates must be a positive int"),
        ({"exact_below": -1}, ValueError, "exact_below must be an int of 0 or more"),
        ({"seed": None}, TypeError, "seed must be an int of 0 or more"),
    ],
)
def test_refused_options(options, error, message):
    with pytest.raises(error, match=f"Approximate: {message}"):
        Approximate(**options)


@pytest.mark.parametrize(
    ("search", "error"), [("faiss", ValueError), (None, TypeError), (True, TypeError)]
)
def test_refused_searches(search, error):
    with pytest.raises(error, match="search must be 'exact', 'approximate' or an Approximate"):
        distribution_features(*POOL, search=search)


def test_without_faiss(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    distribution_features(*POOL)
    with pytest.raises(ModuleNotFoundError, match=r"search must be 'exact' without faiss.*approxi"):
        searched()
