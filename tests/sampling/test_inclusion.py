"""Inclusion probabilities and the draw: sums, bounds, and every subset with its probability."""

import itertools

import pytest
import torch
from subsets import design

from mts_fast.sampling import (
    Draw,
    difference_estimator,
    inclusion_probabilities,
    regression_estimator,
    size_measure,
    systematic_sample,
)

SIZES = {
    "even": torch.ones(8),
    "ordinary": torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]),
    "extreme": torch.tensor([1e6, 1.0, 1.0, 1.0, 1e-3, 1e-3, 1e-6, 1e-9]),
    "two giants": torch.tensor([1e12, 1e12, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
}


def by_trial(sizes, k):
    """pi by bisection for s: sum min(1, s a) = k."""
    low, high = 0.0, 1e30
    for _ in range(2000):
        middle = (low * high) ** 0.5 if low else high / 2e3
        if sum(min(1.0, middle * a) for a in sizes.tolist()) < k:
            low = middle
        else:
            high = middle
        if low and high / low < 1 + 1e-15:
            break
    return torch.tensor([min(1.0, high * a) for a in sizes.tolist()], dtype=torch.float64)


@pytest.mark.parametrize("k", [1, 3, 4, 8])  # one, some, the half, all
@pytest.mark.parametrize("name", SIZES)
def test_inclusion_probabilities_solve_their_equation(name, k):
    sizes = SIZES[name].double()
    pi = inclusion_probabilities(sizes, k)
    torch.testing.assert_close(pi, by_trial(sizes, k), rtol=1e-12, atol=1e-12)
    assert abs(float(pi.sum()) - k) < 1e-12
    assert float(pi.max()) <= 1.0
    assert float(pi.min()) > 0.0


STRATA = torch.tensor([2, 0, 1, 0, 1, 2, 0, 1])


@pytest.mark.parametrize("strata", [None, STRATA], ids=["random order", "by stratum"])
@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize("name", SIZES)
def test_every_subset_enumerated_gives_the_inclusion_probabilities(name, k, strata):
    pi = inclusion_probabilities(SIZES[name].double(), k)
    subsets, chances = design(pi, k, strata)
    assert all(len(set(s.tolist())) == k for s in subsets)
    assert abs(float(chances.sum()) - 1) < 1e-12
    by_subsets = torch.zeros(8, dtype=torch.float64)
    for subset, chance in zip(subsets, chances, strict=True):
        by_subsets[subset] += chance
    torch.testing.assert_close(by_subsets, pi, rtol=0, atol=1e-12)


@pytest.mark.parametrize("strata", [None, STRATA], ids=["random order", "by stratum"])
def test_draws_follow_the_enumerated_design(strata):
    pi = inclusion_probabilities(SIZES["ordinary"].double(), 4)
    subsets, chances = design(pi, 4, strata)
    place = {tuple(s.tolist()): i for i, s in enumerate(subsets)}
    generator = torch.Generator().manual_seed(3)
    draws = 20_000
    counts = torch.zeros(len(subsets), dtype=torch.float64)
    for _ in range(draws):
        counts[
            place[tuple(systematic_sample(pi, 4, strata=strata, generator=generator).tolist())]
        ] += 1
    # chi-square over the 70 subsets; 5 standard deviations of its sum above its mean
    expected = draws * chances
    possible = expected > 0
    assert not counts[~possible].any()
    statistic = float(((counts - expected).square() / expected)[possible].sum())
    freedom = int(possible.sum()) - 1
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5


def test_a_weight_is_bounded_by_its_own_part_of_the_measure():
    generator = torch.Generator().manual_seed(0)
    for spread, k in itertools.product((1.0, 10.0, 40.0), (4, 16, 64)):
        p = (spread * torch.randn(128, generator=generator, dtype=torch.float64)).softmax(0)
        norms = torch.rand(128, generator=generator, dtype=torch.float64).pow(8)
        pi = inclusion_probabilities(size_measure(p, norms), k)
        assert bool((p / pi <= p.clamp(min=1 / (0.3 * k)) * (1 + 1e-12)).all())


def test_without_errors_the_measure_follows_the_weights():
    p = torch.tensor([0.5, 0.3, 0.2])
    expected = 0.9 * p.double() + 0.1 / 3
    torch.testing.assert_close(size_measure(p, torch.zeros(3)), expected)
    torch.testing.assert_close(size_measure(p), expected)
    torch.testing.assert_close(size_measure(torch.zeros(4)), torch.full((4,), 0.25).double())


def test_every_stratum_has_its_expected_count_to_within_one():
    generator = torch.Generator().manual_seed(5)
    strata = torch.arange(40) % 5
    pi = inclusion_probabilities(torch.rand(40, generator=generator, dtype=torch.float64), 13)
    expected = torch.zeros(5, dtype=torch.float64).index_add_(0, strata, pi)
    for _ in range(50):
        chosen = systematic_sample(pi, 13, strata=strata, generator=generator)
        assert bool(((strata[chosen].bincount(minlength=5) - expected).abs() < 1).all())


@pytest.mark.parametrize("k", [1, 4, 7])
def test_the_difference_estimator_is_unbiased_by_enumeration(k):
    generator = torch.Generator().manual_seed(1)
    dots, rough = torch.randn(2, 8, generator=generator, dtype=torch.float64)
    slope = torch.tensor(0.7, dtype=torch.float64)
    pi = inclusion_probabilities(size_measure(SIZES["extreme"]), k)
    for approximate in (None, rough):
        mean = torch.zeros(8, dtype=torch.float64)
        for subset, chance in zip(*design(pi, k), strict=True):
            estimate = difference_estimator(Draw(subset, pi), dots[subset], approximate, slope)
            mean += chance * estimate
        torch.testing.assert_close(mean, dots, rtol=0, atol=1e-11)


def test_the_regression_estimator_is_exact_where_dots_are_a_line_of_the_known():
    generator = torch.Generator().manual_seed(2)
    rough = torch.randn(32, generator=generator, dtype=torch.float64)
    p = torch.rand(32, generator=generator, dtype=torch.float64).softmax(0)
    pi = inclusion_probabilities(size_measure(p), 8)
    draw = Draw(systematic_sample(pi, 8, generator=generator), pi)
    dots = 2 * rough - 3
    regression = regression_estimator(draw, p, dots[draw.indices], rough)
    assert float(regression.slope) == pytest.approx(2, abs=1e-12)
    assert float(regression.correlation) == pytest.approx(1, abs=1e-12)
    constant = regression.dots - dots
    torch.testing.assert_close(constant, constant[:1].expand(32), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: inclusion_probabilities(torch.ones(4), 5), r"k must be at most .*\(4\), got 5"),
        (lambda: inclusion_probabilities(torch.ones(4), 0), "k must be"),
        (lambda: inclusion_probabilities(torch.tensor([1.0, 0.0]), 1), "sizes must be positive"),
        (lambda: inclusion_probabilities(torch.tensor([1.0, torch.nan]), 1), "sizes must be"),
        (lambda: systematic_sample(torch.ones(2, 2), 1), "inclusion must be"),
        (lambda: systematic_sample(torch.ones(3), 3, strata=torch.ones(3)), "strata must be"),
        (lambda: size_measure(torch.ones(3), torch.ones(4)), "error_norms must be"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()
