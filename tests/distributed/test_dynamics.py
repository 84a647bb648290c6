"""Forgetting counts and columns by sample over ranks: those of one process."""

import pytest
import rank_dynamics
import torch
from comparison import assert_bitwise
from rank_pool import SLOW

from mts_fast import features, reference
from mts_fast.distributed import ForgettingCounter, joined_columns

SIZE, EPOCHS = 13, 6


@pytest.mark.parametrize("kind", ["mean", pytest.param("bert", marks=SLOW)])
@pytest.mark.parametrize("size", [2, 4])
def test_a_training_whose_sampler_repeats_samples(ranks, size, kind):
    """13 samples are padded to 14 and 16. The truth is counted from all predictions by hand."""
    results = ranks.results(rank_dynamics.train, size, SIZE, EPOCHS, kind)
    history = torch.zeros(EPOCHS, SIZE, dtype=torch.bool)
    known, predicted = set(), 0
    for predictions, *_ in results:
        for epoch, index, correct in predictions:
            predicted += 1
            if (epoch, index) not in known:
                history[epoch, index] = correct
                known.add((epoch, index))
    assert predicted == EPOCHS * {2: 14, 4: 16}[size] and len(known) == EPOCHS * SIZE
    counts, never = reference.forgetting(history)
    assert counts.max() > 0
    texts, model = rank_dynamics.Texts(SIZE), rank_dynamics.classifier(kind)
    model.load_state_dict(results[0][3])
    inputs = {"input_ids": texts.ids, "attention_mask": texts.mask}
    scores = features.training_dynamics(model, inputs, texts.labels)
    for _, columns, joined, _ in results:
        assert torch.equal(columns["forgetting_counts"], counts[:, None].float())
        assert torch.equal(columns["never_correct"], never[:, None].float())
        assert list(joined) == list(scores)
        for name, column in scores.items():
            # batches differ; observed 1e-16
            torch.testing.assert_close(joined[name], column, rtol=1e-12, atol=1e-14)


def random_epochs(ranks, epochs, seed=0):
    """Epochs for `replay`: each sample on random ranks, up to three times, with other flags, some
    on none; and the history [epochs, N] of the predictions that count, with who was predicted."""
    g = torch.Generator().manual_seed(seed)
    history = torch.zeros(epochs, SIZE, dtype=torch.bool)
    predicted = torch.zeros(epochs, SIZE, dtype=torch.bool)
    plan = []
    for epoch in range(epochs):
        parts = []
        for _ in range(ranks):
            count = int(torch.randint(0, 9, (1,), generator=g))
            calls = []
            for _ in range(2):
                indices = torch.randint(SIZE, (count,), generator=g)
                flags = torch.rand(count, generator=g) < 0.5
                calls.append((indices, flags))
                for i, flag in zip(indices.tolist(), flags.tolist(), strict=True):
                    if not predicted[epoch, i]:
                        predicted[epoch, i], history[epoch, i] = True, flag
            parts.append(calls)
        plan.append(parts)
    return plan, history, predicted


def by_one_process(history, predicted):
    counter = features.ForgettingCounter(SIZE)
    for correct, present in zip(history, predicted, strict=True):
        indices = present.nonzero().flatten()
        counter.update(indices, correct[indices])
    return counter.columns()


@pytest.mark.parametrize("size", [2, 4])
def test_the_lowest_ranks_first_prediction_counts(ranks, size):
    plan, history, predicted = random_epochs(size, 8)
    assert not predicted.all()
    expected = by_one_process(history, predicted)
    for columns, state in ranks.results(rank_dynamics.replay, size, SIZE, plan):
        assert_bitwise(columns, expected)
        assert state["epoch"].tolist() == [8]


def test_a_state_of_two_ranks_resumes_on_four_and_on_one(ranks):
    """Two epochs and a part of the third on 2 ranks, the rest on 4, then on one process."""
    first, *rest = (random_epochs(n, e, seed=n) for n, e in ((2, 3), (4, 3), (1, 2)))
    saved = ranks.results(rank_dynamics.replay, 2, SIZE, first[0], None, True)
    assert_bitwise(saved[0][1], saved[1][1])
    four = ranks.results(rank_dynamics.replay, 4, SIZE, rest[0][0], saved[1][1])
    columns, _ = rank_dynamics.replay(None, SIZE, rest[1][0], four[3][1])
    # the third epoch: what two ranks had predicted counts, then what four have
    begun, present = first[1][2], first[2][2]
    third = torch.where(present, begun, rest[0][1][0]), present | rest[0][2][0]
    history = torch.cat([first[1][:2], third[0][None], rest[0][1][1:], rest[1][1]])
    predicted = torch.cat([first[2][:2], third[1][None], rest[0][2][1:], rest[1][2]])
    assert_bitwise(columns, by_one_process(history, predicted))


def test_ranks_that_differ_or_call_twice_count_nothing(ranks):
    results = ranks.results(rank_dynamics.failures, 3)
    for rank, (texts, counts) in enumerate(results):
        assert "num_samples must be the same on every rank, got 5 on rank 1 and 4" in texts["sizes"]
        assert "predictions must be those of all, got 1 calls of update() since" in texts["state"]
        said = "the call must be the same on every rank, got 'merge' on rank 1 and 'end_epoch("
        assert said in texts["calls"]
        said = "the epoch must be of all 4 samples, got none for 1 of them (3); update() with"
        assert said in texts["incomplete"]
        assert texts["ended"] == 3
        said = "the epoch must be of some predictions, got none on any rank; call update() before"
        assert said in texts["twice"]
        said = "the number of epochs must be the same on every rank, got 5 on rank 1 and 1 on rank"
        assert said in texts["epochs"]
        assert counts == [0, 0, 0, 0], rank


def test_one_process_counts_as_a_group_of_one():
    plan, history, predicted = random_epochs(1, 5, seed=3)
    columns, state = rank_dynamics.replay(None, SIZE, plan)
    assert_bitwise(columns, by_one_process(history, predicted))
    other = ForgettingCounter(SIZE)
    with pytest.raises(ValueError, match=r"indices must be in \[0, 13\)"):
        other.update(torch.tensor([13]), torch.tensor([1]))
    before = other.state_dict()
    with pytest.raises(TypeError, match=r"state\['seen'\] must be a torch.bool tensor of 13"):
        other.load_state_dict(features.ForgettingCounter(SIZE).state_dict())
    assert_bitwise(other.state_dict(), before)
    with pytest.raises(TypeError, match="complete must be True or False"):
        other.end_epoch(complete=1)
    other.update(torch.tensor([0]), torch.tensor([1]))
    other.load_state_dict(state)  # drops what was not merged
    assert_bitwise(other.state_dict(), state)


def test_kept_predictions_are_copies():
    counter, indices, flags = ForgettingCounter(2), torch.tensor([0]), torch.tensor([True])
    counter.update(indices, flags)
    indices.add_(1)
    flags.logical_not_()
    counter.end_epoch()
    assert counter.never_correct.tolist() == [False, True]


def test_columns_are_joined_by_number(ranks):
    for columns in ranks.results(rank_dynamics.joined_with_an_empty_rank, 3):
        assert columns["loss"].tolist() == [0.0, 1.5, 2.5, 3.5, 4.0]
        assert columns["pair"].tolist() == [[0, 1], [1, 1], [2, 3], [3, 0], [4, 0]]


def test_columns_that_do_not_fit_are_refused_on_all_ranks(ranks):
    for rank, texts in enumerate(ranks.results(rank_dynamics.bad_columns, 2)):
        said = "indices must be of all 6 samples, on some rank each, got none for 2 of them (4, 5)"
        assert said in texts["missing"]
        assert "indices must be in [0, 4), got values from 11 to 12" in texts["range"]
        assert rank == 1 or "on rank 1" in texts["range"]
        assert "the names of columns must be the same on every rank" in texts["names"]
        assert "columns must be of one dtype and width on every rank" in texts["widths"]
        assert "num_samples must be the same on every rank, got 5 on rank 1" in texts["sizes"]


@pytest.mark.parametrize(
    ("columns", "indices", "error", "message"),
    [
        ({}, torch.arange(2), ValueError, "columns must be of one column or more, got none"),
        (None, torch.arange(2), TypeError, "columns must be a mapping"),
        ({"a": torch.ones(3)}, torch.arange(2), ValueError, "column 'a' must be of length 2"),
        ({"a": torch.ones(2).long()}, torch.arange(2), TypeError, "column 'a' must be a floating"),
        ({"a": torch.ones(2, 1, 1)}, torch.arange(2), ValueError, r"column 'a' must be \[n\] or"),
        ({"a": torch.ones(2)}, torch.ones(2), TypeError, "indices must be an integer tensor"),
        ({"a": torch.ones(0)}, torch.arange(0), ValueError, "indices must be of all 2 samples"),
    ],
)
def test_refused_columns(columns, indices, error, message):
    with pytest.raises(error, match=f"joined_columns: {message}"):
        joined_columns(columns, indices, 2)
