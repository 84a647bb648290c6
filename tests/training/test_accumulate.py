"""Several calls that make one step."""

import copy

import pytest
import torch
from small_steps import CLASSES, plain_model, step_of

import mts_fast

EACH, CALLS = 6, 3


def parts(seed, *, validation=4):
    """The arguments of the calls of one step."""
    g = torch.Generator().manual_seed(seed)
    return [
        {
            "inputs": torch.randn(EACH, 4, generator=g, dtype=torch.float64),
            "labels": torch.randint(CLASSES, (EACH,), generator=g),
            "val_inputs": torch.randn(validation, 4, generator=g, dtype=torch.float64),
            "val_labels": torch.randint(CLASSES, (validation,), generator=g),
        }
        for _ in range(CALLS)
    ]


def whole(calls):
    return {name: torch.cat([c[name] for c in calls]) for name in calls[0]}


def assert_same(a, b):
    torch.testing.assert_close(a.state_dict()["model"], b.state_dict()["model"])
    torch.testing.assert_close(a.state_dict()["selector"], b.state_dict()["selector"])


@pytest.mark.parametrize("options", [{}, {"schedule": "reuse"}, {"engine": "double_backward"}])
def test_the_calls_of_a_step_are_one_batch(options):
    several = step_of(plain_model(), accumulate=CALLS, **options)
    one = step_of(plain_model(), **options)
    for seed in range(4):
        calls = parts(seed)
        results = [several(**c) for c in calls]
        assert results[:-1] == [None] * (CALLS - 1)
        expected = one(**whole(calls))
        torch.testing.assert_close(results[-1].dots, expected.dots)
        torch.testing.assert_close(results[-1].loss, expected.loss)
    assert several.steps == 4
    assert_same(several, one)


@pytest.mark.parametrize("silent", ["val_labels", "val_weights"])
def test_a_call_whose_validation_samples_count_nothing(silent):
    """The joined batch is what has to count."""
    several, one = step_of(plain_model(), accumulate=CALLS), step_of(plain_model())
    calls = parts(0)
    for number, call in enumerate(calls):
        call["val_weights"] = torch.full((4,), float(number > 0 or silent == "val_labels"))
        if silent == "val_labels" and number == 0:
            call["val_labels"] = torch.full((4,), -100)
        several(**call)
    one(**whole(calls))
    assert several.steps == 1
    assert_same(several, one)


def test_memory_is_that_of_one_call():
    step = step_of(plain_model(), accumulate=CALLS)
    sizes = []
    step.model.register_forward_hook(lambda m, args, y: sizes.append(len(args[0])))
    for call in parts(0):
        step(**call)
    assert max(sizes) == EACH


def test_validation_samples_of_all_calls_do_not_run_at_once():
    selector = mts_fast.Selector(4, CLASSES, hidden=(8,)).double()
    options = {"accumulate": CALLS, "online_features": True}
    step = step_of(plain_model(), selector=selector, **options)
    sizes = []
    step.model.register_forward_hook(lambda m, args, y: sizes.append(len(args[0])))
    for seed in range(2):
        for call in parts(seed, validation=EACH):
            step(**call)
    assert max(sizes) == EACH


def test_one_validation_set_in_every_call_counts_once():
    selector = mts_fast.Selector(4, CLASSES, hidden=(8,)).double()
    steps = [
        step_of(plain_model(), selector=copy.deepcopy(selector), online_features=True, **options)
        for options in ({"accumulate": CALLS}, {})
    ]
    calls = parts(0)
    same = {name: calls[0][name] for name in ("val_inputs", "val_labels")}
    for call in calls:
        result = steps[0](**call | same)
    rows = whole([{n: c[n] for n in ("inputs", "labels")} for c in calls])
    expected = steps[1](**rows, **same)
    torch.testing.assert_close(result.dots, expected.dots)
    assert_same(*steps)


@pytest.mark.parametrize("name", ["inputs", "labels", "val_inputs"])
@pytest.mark.parametrize("last", [False, True])
def test_a_buffer_that_is_filled_again_is_refused(name, last):
    """Else all calls of a step would be the last one's samples."""
    step = step_of(plain_model(), accumulate=CALLS)
    calls = parts(0)
    step(**calls[0])
    if last:
        step(**calls[1])
    calls[last][name].copy_(calls[2][name])
    with pytest.raises(RuntimeError, match=f"{name} must be left as they are .*drop_waiting"):
        step(**calls[1 + last] | {name: calls[last][name]})
    assert step.drop_waiting() == 1 + last
    for call in parts(1):
        result = step(**call)
    assert result is not None and step.steps == 1


def test_all_arguments_are_joined():
    torch.manual_seed(0)
    options = {"val_objective": "group_balanced", "class_weight": torch.tensor([1.0, 2.0, 0.5])}
    selectors = [mts_fast.Selector(2, CLASSES, hidden=(8,)).double() for _ in range(2)]
    selectors[1].load_state_dict(selectors[0].state_dict())
    several = step_of(plain_model(), selector=selectors[0], accumulate=CALLS, **options)
    one = step_of(plain_model(), selector=selectors[1], **options)
    for seed in range(2):
        calls = parts(seed)
        for call in calls:
            call["features"] = torch.randn(EACH, 2).double()
            call["is_synthetic"] = torch.rand(EACH) < 0.5
            call["val_groups"] = torch.randint(3, (4,))
            call["val_weights"] = torch.rand(4).double() + 0.1
            call["inputs"] = (call["inputs"],)  # a nest
        for call in calls:
            several(**call)
        joined = {k: [c[k] for c in calls] for k in calls[0]}
        joined["inputs"] = [x for (x,) in joined["inputs"]]
        one(**{k: torch.cat(v) for k, v in joined.items()})
    assert_same(several, one)


def test_a_bad_call_is_not_taken_and_the_others_wait():
    several, one = step_of(plain_model(), accumulate=CALLS), step_of(plain_model())
    calls = parts(0)
    several(**calls[0])
    with pytest.raises(ValueError, match="labels must be in"):
        several(**calls[1] | {"labels": calls[1]["labels"] + 9})
    with pytest.raises(ValueError, match="val_weights must be given alike in every call"):
        several(**calls[1], val_weights=torch.ones(4))
    several(**calls[1])
    with pytest.raises(ValueError, match="finite"):
        several(**calls[2] | {"inputs": calls[2]["inputs"] * torch.nan})
    several(**calls[2])
    one(**whole(calls))
    assert_same(several, one)


def test_a_state_in_the_middle_of_a_step_is_refused():
    step, calls = step_of(plain_model(), accumulate=CALLS), parts(0)
    state = step.state_dict()
    step(**calls[0])
    with pytest.raises(RuntimeError, match="must be complete, got 1 of 3 calls"):
        step.state_dict()
    step.load_state_dict(state)  # drops what waits
    assert step(**calls[0]) is None and step(**calls[1]) is None
    assert step(**calls[2]) is not None


def test_what_waits_can_be_dropped():
    step, calls = step_of(plain_model(), accumulate=CALLS), parts(0)
    step(**calls[0] | {"inputs": calls[0]["inputs"] * torch.nan})
    step(**calls[1])
    with pytest.raises(ValueError, match="finite"):
        step(**calls[2])
    assert step.drop_waiting() == 2
    assert [step(**c) is None for c in calls] == [True, True, False]


@pytest.mark.parametrize("wrong", [torch.tensor(2.0), "other"])
def test_numbers_that_differ_between_calls_are_refused(wrong):
    step, calls = step_of(plain_model(), accumulate=CALLS), parts(0)
    extra = torch.tensor(1.0) if isinstance(wrong, torch.Tensor) else "one"
    step(**calls[0] | {"inputs": {"input": calls[0]["inputs"], "more": extra}})
    with pytest.raises(ValueError, match="inputs must be given alike in every call"):
        step(**calls[1] | {"inputs": {"input": calls[1]["inputs"], "more": wrong}})


@pytest.mark.parametrize("value", [0, 1.5, True, None])
def test_bad_numbers_of_calls(value):
    with pytest.raises((TypeError, ValueError), match="accumulate must be"):
        step_of(plain_model(), accumulate=value)
