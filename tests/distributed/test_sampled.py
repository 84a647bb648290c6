"""Sampled steps over ranks: one draw from the candidates of all, and one process's results."""

import pytest
import rank_sampled
import torch
from rank_comparison import ENGINES, assert_equals_one_process
from rank_pool import SLOW


@pytest.mark.parametrize(
    ("size", "sizes"), [(2, (9, 3)), pytest.param(4, (6, 0, 4, 2), marks=SLOW)], ids=str
)
@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine(ranks, engine, size, sizes):
    near = {"rtol": 1e-4, "atol": 1e-6} if engine == "finite_difference" else {}
    options = {"engine": engine, "compute": 5, "wrapped": {}}
    assert_equals_one_process(ranks, size, options, sizes, (4,) * size, **near)


OPTIONS = [
    {"compute": 0.4, "schedule": "reuse", "optimizer": "adamw"},
    {"compute": 3, "selector_batch": True},
    {"compute": "auto"},
]
MORE_OPTIONS = [
    {"compute": 2, "warmup_steps": 3, "selector_every": 2},
    {"compute": 5, "micro_batch": 2, "class_weight": True},
    {"compute": 4, "model": "no head"},
    {"compute": 4, "model": "unused"},
    {"compute": 4, "model": "norm", "by_hosts": True},
    {"compute": 12},
    {"compute": 1, "online": False},
]


@pytest.mark.parametrize(
    "options", [*OPTIONS, *(pytest.param(o, marks=SLOW) for o in MORE_OPTIONS)], ids=str
)
def test_every_option(ranks, options):
    assert_equals_one_process(ranks, 3, options, (2, 7, 3), (3, 3, 2))


@pytest.mark.parametrize("compute", [2, 5, 6])
def test_every_rank_computes_as_many(ranks, compute):
    options = {"compute": compute}
    several = ranks.results(rank_sampled.computed_here, 3, options, (10, 1, 1))
    assert [sum(of_call) for of_call in zip(*several, strict=True)] == [compute] * 4
    assert max(map(max, several)) - min(map(min, several)) <= 1


def test_samples_of_unequal_shape_stay_on_their_rank(ranks):
    """Nothing can be moved there; with all of them drawn the step is the exact one."""
    exact = ranks.results(rank_sampled.of_unequal_lengths, 3, None)
    whole = ranks.results(rank_sampled.of_unequal_lengths, 3, 12)
    torch.testing.assert_close(whole, exact, rtol=1e-10, atol=1e-12)
    part = ranks.results(rank_sampled.of_unequal_lengths, 3, 4)
    torch.testing.assert_close(part[1:], part[:1] * 2, rtol=0, atol=0)


@pytest.mark.parametrize("sizes", [(7, 5), (7, 0, 5)])
def test_batch_statistics_are_those_of_a_rank(ranks, sizes):
    for exact, whole in ranks.results(rank_sampled.sampled_against_exact, len(sizes), sizes):
        torch.testing.assert_close(whole, exact, rtol=1e-9, atol=1e-10)


def test_ranks_draw_alike_and_anew_and_leave_their_generators(ranks):
    results = ranks.results(rank_sampled.draws, 3, 6)
    numbers, _ = results[0]
    assert len({tuple(n) for n in numbers}) > 3
    for of_rank, unchanged in results:
        assert of_rank == numbers
        assert unchanged


def test_a_resumed_step_draws_as_it_would_have(ranks):
    for straight, resumed in ranks.results(rank_sampled.resumed_draws, 2):
        torch.testing.assert_close(resumed, straight, rtol=0, atol=0)


def test_bytes_of_a_step(ranks):
    """Beside the exact step's: the last layer's part of row 3, and the drawn samples that move."""
    options = {"model": "large", "compute": 4}
    for calls, sizes, gradients, last in ranks.results(rank_sampled.count_messages, 2, options):
        assert calls["all_reduce"] == 3
        assert sum(sizes.values()) <= 3.1 * gradients + last
        assert set(calls) <= {"all_reduce", "all_gather", "all_to_all_single"}
        assert calls["all_gather"] == 9


def test_ranks_that_compute_other_numbers_are_named(ranks):
    for text in ranks.results(rank_sampled.disagree, 3):
        assert "the options must be the same on every rank" in text and "'compute': 3" in text


def test_inputs_of_another_structure_are_named(ranks):
    for text in ranks.results(rank_sampled.other_inputs, 3):
        assert "the inputs must be the same on every rank" in text
