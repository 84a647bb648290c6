"""A rank that fails, disagrees or dies stops all of them, by name, and nothing is lost."""

import pytest
import rank_failures
import torch
from rank_pool import SLOW, Raised, RankPool

FAILURES = {
    "labels out of range": ("labels must be in", "ValueError on rank 1"),
    "NaN in the features": ("features must be finite", "ValueError on rank 1"),
    "NaN in the inputs": ("must be finite", "ValueError on rank 1"),
    "NaN in the validation batch": ("features of val_inputs must be finite", "on rank 1"),
    "a NaN in the loss of the validation batch": ("validation loss must be finite", "on rank 1"),
    "the forward raises": ("no forward here", "OSError on rank 1: no forward here"),
    "the backward raises": ("no backward here", "OSError on rank 1: no backward here"),
    "the loss of the validation batch raises": ("no loss here", "OSError on rank 1: no loss here"),
    "the wrong number of features": (
        "must be of one dtype and width",
        "must be of one dtype and width",
    ),
}


@pytest.mark.parametrize("options", [{}, {"by_hosts": True}, {"compute": 5}], ids=str)
@pytest.mark.parametrize("failure", list(FAILURES))
def test_all_ranks_raise_and_go_on(ranks, failure, options):
    results = ranks.results(rank_failures.fail_once, 3, failure, options)
    here, elsewhere = FAILURES[failure]
    for rank, (kind, text, unchanged, continued) in enumerate(results):
        assert (here if rank == 1 else elsewhere) in text, f"rank {rank}: {kind}: {text}"
        assert unchanged, f"rank {rank} has changed"
        assert continued == results[0][3]


def test_an_engine_that_one_rank_refuses_is_refused_by_all(ranks):
    engines = ranks.results(rank_failures.refuse_on_one_rank, 3)
    assert engines == [["ghost", "double_backward", "double_backward"]] * 3


DIFFERENCES = {
    "schedule": "the options must be the same on every rank",
    "steps": "the number of completed steps must be the same on every rank",
    "engine": "the engine must be the same on every rank",
    "frozen": "the trainable parameters must be the same on every rank",
    "model": "the values of the model's parameters must be the same on every rank",
    "selector": "the values of the selector's parameters must be the same on every rank",
    "weights": "the arguments must be the same on every rank",
}


@pytest.mark.parametrize("difference", list(DIFFERENCES))
def test_ranks_that_disagree_are_named(ranks, difference):
    results = ranks.results(rank_failures.disagree, 3, difference)
    for text in results:
        assert DIFFERENCES[difference] in text and "on rank 2" in text, text


def test_a_process_group_that_is_younger_than_the_step_is_refused(ranks):
    for text in ranks.results(rank_failures.step_before_the_group, 3):
        assert "process_group must be that of the step's construction" in text


OTHER_GROUPS = {
    "sharded since": "model must be as when the step was built, got one that was sharded since",
    "wrapped for another group": "process_group must be that of the wrapped model, got another",
    "destroyed": "process_group must be initialised, got one that was destroyed",
    "gone": "process_group must be that of the step's construction, got another, or none",
}


@pytest.mark.parametrize("how", OTHER_GROUPS)
def test_another_group_than_that_of_the_construction_is_refused(ranks, how):
    for text in ranks.results(rank_failures.other_group, 4, how):
        assert OTHER_GROUPS[how] in text, text


BACKENDS = {
    "tensors on the CPU": "process_group must be one that exchanges tensors on 'cpu', got backends"
    " for cuda; move the model",
    "gloo": "process_group must be used with gloo beside it, got no gloo",
}


def test_hosts_of_all_ranks_meet(ranks):
    assert ranks.results(rank_failures.sum_of_hosts, 4) == [4.0] * 4


@pytest.mark.parametrize("what", BACKENDS)
def test_a_backend_without_what_a_step_needs_is_refused(ranks, what):
    for text in ranks.results(rank_failures.backend_without, 4, what):
        assert BACKENDS[what] in text, text


def test_a_sampler_that_is_older_than_the_process_group_is_refused(ranks):
    for text in ranks.results(rank_failures.sampler_before_the_group, 2):
        assert "GlobalBatchSampler: ranks must be 1, as when the sampler was made, got" in text


def test_a_batch_that_no_rank_has_is_refused(ranks):
    for text in ranks.results(rank_failures.no_samples, 3):
        assert "labels must be non-empty on some rank" in text


def test_a_selector_with_dropout_draws_alike(ranks):
    first, *others = ranks.results(rank_failures.train_with_dropout, 3)
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=0)


@SLOW
@pytest.mark.parametrize("way", ["killed", "hangs"])
def test_a_rank_that_goes_is_named_within_the_time_out(way):
    pool = RankPool(3, time_out=6)
    try:
        results = pool.run(rank_failures.lose_a_rank, 3, way)
        if way == "killed":
            assert results[1] is None
        for rank in (0, 2):
            assert isinstance(results[rank], Raised)
            assert "every rank must be in the call" in results[rank].text
            assert "rank 1" in results[rank].text, results[rank].text
            assert "from the last checkpoint" in results[rank].text
    finally:
        pool.close()
