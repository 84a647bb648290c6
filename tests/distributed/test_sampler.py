"""Batches that do not depend on the number of ranks."""

from itertools import chain

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from mts_fast.distributed import GlobalBatchSampler, IndexedDataset


def of_all(size, batch, ranks, epochs=1, **options):
    """The joined batches of some epochs."""
    numbers = range(ranks)
    samplers = [GlobalBatchSampler(size, batch, rank=r, ranks=ranks, **options) for r in numbers]
    joined = []
    for _ in range(epochs):
        for parts in zip(*samplers, strict=True):
            lengths = [len(p) for p in parts]
            assert max(lengths) - min(lengths) <= 1
            joined.append([i for part in parts for i in part])
    return joined


@pytest.mark.parametrize("ranks", [2, 3, 5])
@pytest.mark.parametrize("drop_last", [False, True])
def test_the_joined_batches_are_those_of_one_process(ranks, drop_last):
    several = of_all(23, 6, ranks, epochs=3, drop_last=drop_last)
    assert several == of_all(23, 6, 1, epochs=3, drop_last=drop_last)
    assert len(several) == 3 * (3 if drop_last else 4)


def test_an_epoch_has_every_sample_once_and_the_next_another_order():
    batches = of_all(20, 4, 2, epochs=2)
    first, second = (list(chain(*batches[i : i + 5])) for i in (0, 5))
    assert sorted(first) == sorted(second) == list(range(20)) and first != second
    assert of_all(20, 4, 2, seed=1) != of_all(20, 4, 2)


def test_a_run_resumes_in_mid_epoch_on_other_ranks():
    whole = of_all(21, 4, 1, epochs=2)
    before = GlobalBatchSampler(21, 4, rank=0, ranks=2)
    iterator = iter(before)
    for _ in range(3):
        next(iterator)
    state = before.state_dict()
    after = [GlobalBatchSampler(21, 4, rank=r, ranks=3) for r in range(3)]
    for sampler in after:
        sampler.load_state_dict(state)
    rest = []
    for _ in range(2):
        rest += [list(chain(*parts)) for parts in zip(*after, strict=True)]
    assert rest == whole[3:]
    # a loader asks ahead: what was trained on is said
    assert before.state_dict(2)["position"] == 2


def test_a_loader_that_asks_ahead_does_not_end_the_epoch():
    sampler = GlobalBatchSampler(20, 4, rank=0, ranks=1)
    assert len(list(sampler)) == 5 and sampler.epochs_done == 1
    assert sampler.state_dict(3) | {"seed": 0} == sampler.state_dict() | {"position": 3}
    resumed = GlobalBatchSampler(20, 4, rank=0, ranks=1)
    resumed.load_state_dict(sampler.state_dict(3))
    assert list(resumed) == of_all(20, 4, 1)[3:]
    with pytest.raises(ValueError, match="state must be of a sampler with batch_size 5"):
        GlobalBatchSampler(20, 5, rank=0, ranks=1).load_state_dict(sampler.state_dict())


def test_a_loader_gives_numbers_and_samples():
    pool = IndexedDataset(TensorDataset(torch.arange(10.0) * 3))
    sampler = GlobalBatchSampler(len(pool), 5, rank=0, ranks=1)
    for i, (x,) in DataLoader(pool, batch_sampler=sampler):
        torch.testing.assert_close(x, i * 3.0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 4), ValueError, "size must be"),
        ((4, 0), ValueError, "batch_size must be"),
        ((4, True), TypeError, "batch_size must be"),
        ((4, 2, {"rank": 2, "ranks": 2}), ValueError, r"rank must be below ranks \(2\)"),
        ((4, 2, {"shuffle": 1}), TypeError, "shuffle must be"),
    ],
)
def test_bad_arguments(arguments, error, message):
    *numbers, options = arguments if isinstance(arguments[-1], dict) else (*arguments, {})
    with pytest.raises(error, match=message):
        GlobalBatchSampler(*numbers, **options)


def test_a_state_of_another_order_is_refused():
    state = GlobalBatchSampler(10, 2, seed=1).state_dict()
    with pytest.raises(ValueError, match="state must be of a sampler with seed 0, got int 1"):
        GlobalBatchSampler(10, 2).load_state_dict(state)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("rank", [0, 1])
def test_torchdatas_loader_resumes_in_mid_epoch(rank, workers):
    """Workers fetch ahead; the state is that of the batches that were given out."""
    stateful = pytest.importorskip("torchdata.stateful_dataloader")
    dataset = IndexedDataset(torch.arange(40))

    def loader():
        sampler = GlobalBatchSampler(40, 8, rank=rank, ranks=2, seed=3)
        return stateful.StatefulDataLoader(dataset, batch_sampler=sampler, num_workers=workers)

    def numbers(batches):
        return [indices.tolist() for indices, _ in batches]

    whole = loader()
    epochs = [numbers(whole), numbers(whole)]
    assert epochs[0] != epochs[1]
    first = loader()
    for _, _batch in zip(range(2), first, strict=False):
        state = first.state_dict()
    resumed = loader()
    resumed.load_state_dict(state)
    assert numbers(resumed) == epochs[0][2:]
    assert numbers(resumed) == epochs[1]
