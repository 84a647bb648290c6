"""MixedBatchSampler: batches of clean samples, and samples drawn by weight."""

import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset

from mts_fast.selection import MixedBatchSampler, discount_learned

WEIGHTS = torch.tensor([0.0, 1.0, 2.0, 5.0])


def drawn(sampler):
    """(indices of the pool, indices of the clean set), of all batches."""
    indices = torch.tensor([i for batch in sampler for i in batch])
    size = len(WEIGHTS)
    return indices[indices < size], indices[indices >= size] - size


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_counts_follow_the_weights_up_to_one(dtype):
    pool, clean = drawn(MixedBatchSampler(WEIGHTS.to(dtype), 3, 10, num_batches=7))
    counts = pool.bincount(minlength=4)
    assert len(pool) == 35 and int(counts[0]) == 0
    expected = 35 * WEIGHTS / WEIGHTS.sum()
    assert (counts - expected).abs().max() < 1
    assert clean.bincount(minlength=3).tolist() in ([12, 12, 11], [12, 11, 12], [11, 12, 12])


def test_scale_of_the_weights_does_not_matter():
    one = MixedBatchSampler(WEIGHTS, 3, 10, seed=4)
    other = MixedBatchSampler(WEIGHTS * 2**20, 3, 10, seed=4)
    assert list(one) == list(other) and len(list(one)) == len(one)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_every_batch_has_the_clean_share(share):
    sampler = MixedBatchSampler(WEIGHTS, 3, 8, num_batches=5, clean_share=share)
    for batch in sampler:
        assert len(batch) == 8
        assert sum(i >= 4 for i in batch) == round(8 * share)


def test_default_length_draws_as_many_as_the_pool_has():
    assert len(MixedBatchSampler(torch.ones(100), 3, 10)) == 20
    assert len(MixedBatchSampler(torch.ones(100), 3, 10, clean_share=1.0)) == 100


def test_batches_are_in_random_order():
    sampler = MixedBatchSampler(torch.ones(1000), 3, 100, num_batches=1, clean_share=0.0)
    (batch,) = sampler
    assert batch != sorted(batch) and len({*batch}) == 100


def test_a_seed_and_an_epoch_repeat():
    sampler = MixedBatchSampler(WEIGHTS, 3, 10, num_batches=3, seed=1)
    first = list(sampler)
    assert list(sampler) == first
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first
    sampler.set_epoch(0)
    assert list(sampler) == first
    assert list(MixedBatchSampler(WEIGHTS, 3, 10, num_batches=3, seed=2)) not in (first, second)


def test_torchs_generator_is_left_alone():
    before = torch.get_rng_state()
    list(MixedBatchSampler(WEIGHTS, 3, 10))
    assert torch.equal(before, torch.get_rng_state())


def test_balanced_over_the_classes_that_have_weight():
    labels = torch.tensor([0, 1, 1, 2])
    pool, _ = drawn(MixedBatchSampler(WEIGHTS, 3, 12, num_batches=10, labels=labels))
    counts = pool.bincount(minlength=4).tolist()
    assert counts[0] == 0  # the only sample of its class has no weight
    assert counts[1] + counts[2] == 30 and counts[3] == 30 and counts[1] in (9, 10, 11)


def test_weights_so_small_that_their_sum_underflows_in_float32():
    pool, _ = drawn(MixedBatchSampler(torch.tensor([1e-45, 0.0, 1e-45, 0.0]), 3, 8, num_batches=2))
    assert pool.bincount(minlength=4).tolist() == [4, 0, 4, 0]


def test_with_a_data_loader():
    pool = TensorDataset(torch.arange(4.0), torch.zeros(4))
    clean = TensorDataset(torch.arange(10.0, 13.0), torch.ones(3))
    sampler = MixedBatchSampler(WEIGHTS, len(clean), 6, num_batches=4)
    loader = DataLoader(ConcatDataset([pool, clean]), batch_sampler=sampler)
    assert len(loader) == 4
    for values, is_clean in loader:
        assert int(is_clean.sum()) == 3
        assert torch.equal(values >= 10, is_clean == 1) and (values > 0).all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weights": [1.0]}, TypeError, "weights must be a tensor, got list"),
        ({"weights": torch.arange(3)}, TypeError, "weights must be a floating-point tensor"),
        ({"weights": torch.ones(3, 1)}, ValueError, "weights must be 1-dimensional"),
        ({"weights": torch.empty(0)}, ValueError, "not negative and not all 0, got an empty"),
        ({"weights": torch.zeros(3)}, ValueError, "not negative and not all 0, got only 0"),
        ({"weights": torch.tensor([1.0, -1.0])}, ValueError, "got -1.0 at 1"),
        ({"weights": torch.tensor([1.0, float("nan")])}, ValueError, "weights must be finite"),
        ({"clean": 0}, ValueError, "clean must be a positive int, got 0"),
        ({"clean": TensorDataset(torch.ones(3))}, TypeError, "clean must be a positive int"),
        ({"batch_size": 2.5}, TypeError, "batch_size must be a positive int"),
        ({"clean_share": 1.5}, ValueError, "clean_share must be a finite number at least 0"),
        ({"num_batches": 0}, ValueError, "num_batches must be a positive int, got 0"),
        ({"labels": torch.zeros(3).long()}, ValueError, "labels must be of length 4"),
        ({"labels": torch.tensor([0, 1, -1, 0])}, ValueError, r"labels must be in \[0, "),
        ({"seed": -1}, ValueError, "seed must be an int of 0 or more, got -1"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    good = {"weights": WEIGHTS, "clean": 3, "batch_size": 10}
    with pytest.raises(error, match=message):
        MixedBatchSampler(**{**good, **arguments})
    with pytest.raises(ValueError, match="epoch must be an int of 0 or more, got -1"):
        MixedBatchSampler(**good).set_epoch(-1)


def test_what_is_learned_is_discounted():
    probability = torch.tensor([0.0, 0.5, 0.75, 1.0])
    weights = discount_learned(WEIGHTS + 1, probability, 2.0)
    assert torch.equal(weights, torch.tensor([1.0, 0.5, 3 / 16, 0.0]))
    assert torch.equal(discount_learned(WEIGHTS, probability, 0), WEIGHTS)
    with pytest.raises(ValueError, match=r"label_probability must be in \[0, 1\], got values from"):
        discount_learned(WEIGHTS, probability.log())
    with pytest.raises(ValueError, match="label_probability must be of length 4"):
        discount_learned(WEIGHTS, probability[:3])
    with pytest.raises(ValueError, match="power must be a finite number at least 0"):
        discount_learned(WEIGHTS, probability, -1)
