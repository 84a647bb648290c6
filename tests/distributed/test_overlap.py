"""Sums of gradients that set out while the backward still works."""

import pytest
import rank_overlap
import torch
from rank_comparison import ENGINES, assert_equals_one_process
from rank_pool import SLOW


@pytest.mark.parametrize("by_hosts", [False, True])
def test_sums_set_out_before_the_backward_ends(ranks, by_hosts):
    for seen in ranks.results(rank_overlap.events, 2, {"by_hosts": by_hosts}):
        # row 3, row 5, and row 9, whose gradients are products of what row 3 has left
        assert seen.count("last gradient") == 2
        first, second = [i for i, e in enumerate(seen) if e == "last gradient"]
        assert seen[:first].count("sum") >= 2
        assert seen[first:second].count("sum") >= 3


OPTIONS = [
    {},
    {"model": "unused", "selector_batch": True},
    {"micro_batch": 2, "schedule": "reuse"},
    {"compute": 5},
]


@pytest.mark.parametrize(
    "options", [*OPTIONS, *(pytest.param({"engine": e}, marks=SLOW) for e in ENGINES[1:])], ids=str
)
@pytest.mark.parametrize("by_hosts", [False, pytest.param(True, marks=SLOW)])
def test_results_are_those_of_one_process(ranks, options, by_hosts):
    options = options | {"bucket_bytes": rank_overlap.BUCKET, "by_hosts": by_hosts}
    near = {"rtol": 1e-4, "atol": 1e-6} if options.get("engine") == "finite_difference" else {}
    assert_equals_one_process(ranks, 3, options, (5, 0, 7), (4, 4, 0), **near)


def test_what_set_out_too_early_is_sent_again(ranks):
    at_the_end = ranks.results(rank_overlap.after_other_sizes, 2, 2**20)
    early = ranks.results(rank_overlap.after_other_sizes, 2, rank_overlap.BUCKET)
    for (expected, never), (parameters, again) in zip(at_the_end, early, strict=True):
        assert never == 0 and again > 0
        torch.testing.assert_close(parameters, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("by_hosts", [False, True])
def test_a_backward_that_raises_in_the_middle_of_a_sum(ranks, by_hosts):
    results = ranks.results(rank_overlap.fails_in_the_backward, 3, by_hosts)
    for rank, (text, unchanged, parameters) in enumerate(results):
        assert "no gradient here" in text
        assert rank == 1 or "on rank 1" in text
        assert unchanged
        torch.testing.assert_close(parameters, results[0][2], rtol=0, atol=0)


def test_sparse_and_missing_gradients(ranks):
    at_the_end = ranks.results(rank_overlap.sparse_gradients, 2, 2**20)
    early = ranks.results(rank_overlap.sparse_gradients, 2, rank_overlap.BUCKET)
    torch.testing.assert_close(early, at_the_end, rtol=1e-12, atol=1e-14)


def test_a_gradient_that_is_computed_anew_is_sent_anew(ranks):
    for sums in ranks.results(rank_overlap.computed_twice, 2):
        for i, total in enumerate(sums):
            expected = torch.full((4,), 2.0 * (i + 1) * (2.0 + 3.0))
            torch.testing.assert_close(total, expected)


@SLOW
def test_a_compiled_model_is_not_compiled_again(ranks):
    at_the_end = ranks.results(rank_overlap.compiled, 2, 2**24)
    early = ranks.results(rank_overlap.compiled, 2, rank_overlap.BUCKET)
    for (state, graphs, announced), (expected, of_one, never) in zip(
        early, at_the_end, strict=True
    ):
        assert announced and not never
        assert graphs == of_one > 0
        torch.testing.assert_close(state, expected, rtol=0, atol=0)
