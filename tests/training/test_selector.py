"""Selector, its parameter groups and its schedule: what they compute, and what they refuse."""

import copy
import math
import pickle

import pytest
import torch
from comparison import assert_bitwise

from mts_fast import Selector
from mts_fast.training import parameter_groups, warmup_cosine

H, Y, S = torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1]), torch.tensor([0, 1, 0, 0, 1])


def by_hand(selector, h, y, s):
    """The same forward from the parameters, one layer after the other."""
    state = selector.state_dict()
    parts = [h.to(state["mlp.0.weight"].dtype)]
    parts += [state[n][i] for n, i in (("class_embed.weight", y), ("group_embed.weight", s))]
    x = torch.cat(parts, dim=1)
    for layer in (0, 2):
        x = (x @ state[f"mlp.{layer}.weight"].T + state[f"mlp.{layer}.bias"]).relu()
    return (x @ state["mlp.4.weight"].T + state["mlp.4.bias"])[:, 0]


@pytest.mark.parametrize("selector_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("feature_dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("integers", [torch.int64, torch.uint8, torch.int16])
def test_logits_of_any_dtypes(integers, feature_dtype, selector_dtype):
    selector = Selector(3, 2, hidden=(7, 6)).to(selector_dtype)
    logits = selector(H.to(feature_dtype), Y.to(integers), S.bool())
    assert logits.dtype == selector_dtype
    expected = by_hand(selector, H.to(feature_dtype), Y, S)
    # sums of 8 products; observed 6e-8 and 1e-16
    torch.testing.assert_close(logits, expected, rtol=0, atol=4 * torch.finfo(selector_dtype).eps)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_features": "9"}, TypeError, "num_features must be an int of 0 or more, got str '9'"),
        ({"num_features": 9.0}, TypeError, "num_features must be an int of 0 or more"),
        ({"num_features": H.shape}, TypeError, "num_features must be an int of 0 or more"),
        ({"num_features": -1}, ValueError, "num_features must be an int of 0 or more, got -1"),
        ({"num_classes": 0}, ValueError, "num_classes must be a positive int"),
        ({"num_classes": True}, TypeError, "num_classes must be a positive int"),
        ({"hidden": 100}, TypeError, r"hidden must be a sequence of widths, got int 100; .*\(100,"),
        ({"hidden": "100"}, TypeError, "hidden must be a sequence of widths"),
        ({"hidden": (100, -5)}, ValueError, r"hidden\[1\] must be an int of 1 or more, got -5"),
        ({"hidden": ("100",)}, TypeError, r"hidden\[0\] must be an int of 1 or more"),
        ({"hidden": (10.0,)}, TypeError, r"hidden\[0\] must be an int of 1 or more"),
        ({"class_embedding": -1}, ValueError, "class_embedding must be an int of 0 or more"),
        ({"class_embedding": 1.5}, TypeError, "class_embedding must be an int of 0 or more"),
        ({"class_embedding": None}, TypeError, "class_embedding must be an int of 0 or more"),
        ({"group_embedding": -1}, ValueError, "group_embedding must be an int of 0 or more"),
        (
            {"num_features": 0, "class_embedding": 0, "group_embedding": 0},
            ValueError,
            "num_features must be such that there is an input, got 0; give it features",
        ),
    ],
)
def test_refused_widths(options, error, message):
    with pytest.raises(error, match=f"Selector: {message}"):
        Selector(**{"num_features": 3, "num_classes": 2} | options)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((H.long(), Y, S), TypeError, "features must be a floating"),
        ((H[:, :2], Y, S), ValueError, r"features must be \[B, 3\] as the selector was built"),
        ((H, Y.float(), S), TypeError, "classes must be an integer"),
        ((H, Y[:4], S), ValueError, "classes must be of length 5"),
        (
            (H, Y + 1, S),
            ValueError,
            r"classes must be in \[0, 2\), got values from 1 to 2; num_cla",
        ),
        ((H, Y - 1, S), ValueError, r"classes must be in \[0, 2\), got values from -1 to 0"),
        ((H, Y, S + 1), ValueError, r"is_synthetic must be in \[0, 2\)"),
        ((H, Y, S[:4]), ValueError, "is_synthetic must be of length 5"),
        ((H.to("meta"), Y, S), ValueError, "features must be on cpu like its parameters"),
        ((H, Y.to("meta"), S), ValueError, "classes must be on cpu like its parameters"),
    ],
)
def test_refused_batches(arguments, error, message):
    with pytest.raises(error, match=f"Selector: {message}"):
        Selector(3, 2)(*arguments)


def test_groups_hold_every_trainable_parameter_once():
    selector = Selector(3, 2, hidden=(4,))
    selector.mlp[2].weight.requires_grad_(False)
    decayed, others = parameter_groups(selector, 1e-4)
    names = {id(p): n for n, p in selector.named_parameters()}
    assert [names[id(p)] for p in decayed["params"]] == [
        "class_embed.weight",
        "group_embed.weight",
        "mlp.0.weight",
    ]
    assert [names[id(p)] for p in others["params"]] == ["mlp.0.bias", "mlp.2.bias"]
    assert (decayed["weight_decay"], others["weight_decay"]) == (1e-4, 0.0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((None, 0.1), TypeError, "module must be a torch.nn.Module, got NoneType"),
        ((Selector, 0.1), TypeError, "module must be a torch.nn.Module, .*call the class to make"),
        ((Selector(3, 2), "0.1"), TypeError, "weight_decay must be a finite number at least 0"),
        ((Selector(3, 2), -0.1), ValueError, "weight_decay must be a finite number at least 0"),
        ((Selector(3, 2), math.nan), ValueError, "weight_decay must be a finite number"),
        ((Selector(3, 2).requires_grad_(False), 0.1), ValueError, "module must be given trainable"),
    ],
)
def test_refused_groups(arguments, error, message):
    with pytest.raises(error, match=f"parameter_groups: {message}"):
        parameter_groups(*arguments)


def optimizer():
    return torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.5)


def rates(adam, schedule, steps):
    learning_rates = []
    for _ in range(steps):
        learning_rates.append(adam.param_groups[0]["lr"])
        adam.step()
        schedule.step()
    return learning_rates


@pytest.mark.parametrize("warmup", [0, 1, 4])
def test_schedule_rises_falls_and_stays_at_zero(warmup):
    adam = optimizer()
    learning_rates = rates(adam, warmup_cosine(adam, warmup, 10), 25)
    rise = [0.5 * (t + 1) / (warmup + 1) for t in range(warmup)]
    span = 10 - warmup
    fall = [0.25 * (1 + math.cos(math.pi * t / span)) for t in range(span)]
    assert learning_rates[:10] == pytest.approx(rise + fall, rel=1e-15)
    assert learning_rates[10:] == [0.0] * 15


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_schedule_resumes(copied):
    whole, first, second = optimizer(), optimizer(), optimizer()
    expected = rates(whole, warmup_cosine(whole, 2, 10), 14)
    schedule = warmup_cosine(first, 2, 10)
    rates(first, schedule, 5)
    resumed = warmup_cosine(second, 2, 10)
    second.load_state_dict(copied(first.state_dict()))
    resumed.load_state_dict(copied(schedule.state_dict()))
    assert_bitwise(rates(second, resumed, 9), expected[5:])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((None, 2, 10), TypeError, "optimizer must be a torch.optim.Optimizer, got NoneType"),
        ((optimizer(), "2", 10), TypeError, "warmup_steps must be an int of 0 or more, got str"),
        ((optimizer(), 2.0, 10), TypeError, "warmup_steps must be an int of 0 or more"),
        ((optimizer(), -1, 10), ValueError, "warmup_steps must be an int of 0 or more, got -1"),
        ((optimizer(), 10, 10), ValueError, r"warmup_steps must be in \[0, 10\), got 10; count"),
        ((optimizer(), 0, 0), ValueError, "total_steps must be a positive int"),
        ((optimizer(), 0, 10.0), TypeError, "total_steps must be a positive int"),
    ],
)
def test_refused_schedules(arguments, error, message):
    with pytest.raises(error, match=f"warmup_cosine: {message}"):
        warmup_cosine(*arguments)
