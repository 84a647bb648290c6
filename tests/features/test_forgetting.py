"""The counter of forgetting against the reference on the whole history."""

import pytest
import torch
from comparison import assert_bitwise

from mts_fast import reference
from mts_fast.features import ForgettingCounter


def random_history(n=9, epochs=12):
    return torch.rand(epochs, n, generator=torch.Generator().manual_seed(4)) < 0.5


def test_counter_in_parts_equals_reference_on_the_history(device):
    """Each epoch's samples come shuffled, in batches, with some integers of narrow dtypes."""
    history = random_history().to(device)
    counter = ForgettingCounter(9, device)
    for epoch, correct in enumerate(history):
        order = torch.randperm(9, generator=torch.Generator().manual_seed(epoch)).to(device)
        for part in order.split(4):
            counter.update(part.to(torch.int32), correct[part].int())
    counts, never = reference.forgetting(history)
    assert torch.equal(counter.counts, counts) and torch.equal(counter.never_correct, never)
    columns = counter.columns()
    assert torch.equal(columns["forgetting_counts"], counts[:, None].float())
    assert torch.equal(columns["never_correct"], never[:, None].float())


def test_samples_seen_at_different_times():
    """A sample is compared with its own last prediction, however long ago."""
    counter = ForgettingCounter(3)
    for indices, correct in (
        ([0, 1], [1, 1]),
        ([1], [0]),
        ([2], [0]),
        ([0, 1], [0, 1]),
        ([1], [0]),
    ):
        counter.update(torch.tensor(indices), torch.tensor(correct))
    assert counter.counts.tolist() == [1, 2, 0]
    assert counter.never_correct.tolist() == [False, False, True]


def test_counter_resumes():
    history = random_history()
    whole, first, second = (ForgettingCounter(9) for _ in range(3))
    everyone = torch.arange(9)
    for correct in history[:5]:
        first.update(everyone, correct)
    second.load_state_dict(first.state_dict())
    for correct in history:
        whole.update(everyone, correct)
    state = first.state_dict()
    for correct in history[5:]:
        second.update(everyone, correct)
    assert_bitwise(second.state_dict(), whole.state_dict())
    # the two counters share nothing
    assert_bitwise(first.state_dict(), state)
    with pytest.raises(ValueError, match=r"state\['counts'\] must be of 4 samples, got 9"):
        ForgettingCounter(4).load_state_dict(whole.state_dict())


TWO = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("indices", "correct", "error", "message"),
    [
        (TWO.float(), TWO, TypeError, "indices must be an integer"),
        (TWO[None], TWO, ValueError, "indices must be 1-dim"),
        (TWO, TWO[:1], ValueError, "correct must be of length 2"),
        (TWO, [True, False], TypeError, "correct must be a tensor"),
        (TWO, TWO.float(), TypeError, "correct must be bool or 0/1 integers, got a float32"),
        (
            TWO,
            TWO * 0.3,
            TypeError,
            "correct must be .*; compare predicted classes with the labels",
        ),
        (TWO, TWO / 0, TypeError, "correct must be bool or 0/1 integers"),
        (TWO, TWO + 1, ValueError, r"correct must be in \[0, 2\), got values from 1 to 2"),
        (TWO, None, TypeError, "correct must be a tensor"),
        (TWO.to("meta"), TWO, ValueError, "indices must be on a device that holds values"),
        (TWO, TWO.bool().to("meta"), ValueError, "correct must be on a device that holds values"),
        (TWO + 2, TWO, ValueError, r"indices must be in \[0, 3\)"),
        (TWO - 1, TWO, ValueError, r"indices must be in \[0, 3\)"),
        (TWO * 0, TWO, ValueError, "indices must be distinct"),
    ],
)
def test_refused_updates_count_nothing(indices, correct, error, message):
    counter = ForgettingCounter(3)
    counter.update(torch.arange(3), torch.ones(3).bool())
    before = counter.state_dict()
    with pytest.raises(error, match=message):
        counter.update(indices, correct)
    assert_bitwise(counter.state_dict(), before)


@pytest.mark.parametrize(("size", "error"), [(0, ValueError), (-1, ValueError), (2.0, TypeError)])
def test_refused_sizes(size, error):
    with pytest.raises(error, match="num_samples must be a positive int"):
        ForgettingCounter(size)


@pytest.mark.parametrize("device", ["gpu", "meta", 3.5, None])
def test_refused_devices(device):
    with pytest.raises((TypeError, ValueError), match="ForgettingCounter: device must be"):
        ForgettingCounter(2, device)


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (
            lambda state: state.pop("last"),
            TypeError,
            r"state\['last'\] must be a torch.bool .*None",
        ),
        (
            lambda state: state.update(ever=state["ever"].int()),
            TypeError,
            r"state\['ever'\] must be",
        ),
        (
            lambda state: state.update(ever=state["ever"][:2]),
            ValueError,
            "must be of 3 samples, got",
        ),
        (lambda state: state.update(last=[True] * 3), TypeError, "tensor of 3 samples, got list"),
        (lambda state: state["counts"].sub_(5), ValueError, "must be 0 or more, got negative ones"),
    ],
)
def test_damaged_states_change_nothing(edit, error, message):
    counter, other = ForgettingCounter(3), ForgettingCounter(3)
    for correct in ([1, 1, 0], [0, 1, 0]):
        counter.update(torch.arange(3), torch.tensor(correct))
    state, before = counter.state_dict(), other.state_dict()
    edit(state)
    with pytest.raises(error, match=rf"ForgettingCounter\.load_state_dict: .*{message}"):
        other.load_state_dict(state)
    assert_bitwise(other.state_dict(), before)
    with pytest.raises(TypeError, match="state must be a mapping, got NoneType"):
        other.load_state_dict(None)
