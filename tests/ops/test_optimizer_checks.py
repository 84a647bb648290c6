"""What is checked of an optimizer, its state and its gradients, and which wrappers are served."""

import copy
import functools
import pickle
import re

import pytest
import torch
from real_optimizers import ones

import mts_fast
from mts_fast.ops.virtual_update import check_optimizer

optim = torch.optim
SGD, Adam, AdamW = optim.SGD, optim.Adam, optim.AdamW


class Overridden(SGD):
    def step(self, closure=None):
        return super().step(closure)


def refused(optimizer, error, message, gradients=None):
    """Expects the error of virtual_update and, with other names, of check_optimizer alone; the
    optimizer's state stays as it is."""
    before = copy.deepcopy(optimizer.state_dict()) if isinstance(optimizer, optim.Optimizer) else 0
    with pytest.raises(error, match="^virtual_update: " + message):
        mts_fast.virtual_update(optimizer, gradients or [torch.ones(2)])
    with pytest.raises(error) as caught:
        check_optimizer(optimizer, op="Step", arg="opt")
    assert str(caught.value).startswith("Step: opt")
    assert re.search("; .", str(caught.value))
    if before:
        assert str(optimizer.state_dict()) == str(before)


# what to build, error, message
REFUSED = {
    "unknown": (optim.Adadelta, TypeError, "optimizer must be SGD, .* got Adadelta; .*register_"),
    "lbfgs": (optim.LBFGS, TypeError, "optimizer .* got LBFGS; it evaluates the model several"),
    "sparse_adam": (optim.SparseAdam, TypeError, "optimizer .*SparseAdam; .*sparse=False"),
    "override": (lambda p: Overridden(p, lr=0.1), TypeError, "optimizer .*which overrides step"),
    "not_one": (lambda p: p[0], TypeError, r"optimizer must be an optimizer \(SGD"),
    "class": (lambda p: SGD, TypeError, r"optimizer must be an optimizer .* got type"),
    "differentiable": (
        lambda p: Adam(p, differentiable=True),
        ValueError,
        r"optimizer\.param_groups\[0\] must be without differentiable, .*differentiable=False",
    ),
    "capturable": (
        lambda p: optim.RMSprop(p, capturable=True),
        ValueError,
        r"optimizer\.param_groups\[0\] must be without capturable off a GPU, .* on cpu; make it",
    ),
    "frozen": (
        lambda p: SGD([q.requires_grad_(False) for q in p], lr=0.1),
        ValueError,
        "optimizer must be given trainable parameters, got none; set requires_grad",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_optimizers(case):
    build, error, message = REFUSED[case]
    refused(build([ones(2)]), error, message)


# options changed between two calls: class, name, value, error, message
NUMBERS = [
    (SGD, "lr", "0.1", TypeError, r"\['lr'\] must be a finite number at least 0, got str '0.1'"),
    (SGD, "lr", float("nan"), ValueError, r"\['lr'\] must be a finite number at least 0, got nan"),
    (SGD, "lr", -0.1, ValueError, r"\['lr'\] must be .* got -0.1; set group\['lr'\] to a number"),
    (SGD, "lr", None, TypeError, r"\['lr'\] must be .* got NoneType"),
    (SGD, "lr", torch.tensor([0.1, 0.2]), ValueError, r"\['lr'\] must be a tensor of one element"),
    (SGD, "lr", torch.tensor(-1.0), ValueError, r"\['lr'\] must be .* got -1.0"),
    (SGD, "momentum", -0.5, ValueError, r"\['momentum'\] must be .* at least 0, got -0.5"),
    (SGD, "weight_decay", "0", TypeError, r"\['weight_decay'\] must be"),
    (SGD, "dampening", float("inf"), ValueError, r"\['dampening'\] must be a finite number, got"),
    (
        Adam,
        "betas",
        (0.9, 1.0),
        ValueError,
        r"\['betas'\] must be .* at least 0 and below 1, got 1",
    ),
    (Adam, "betas", (float("nan"), 0.9), ValueError, r"\['betas'\] must be .* got nan"),
    (AdamW, "eps", -1e-8, ValueError, r"\['eps'\] must be .* at least 0"),
    (optim.RMSprop, "alpha", "a", TypeError, r"\['alpha'\] must be"),
    (optim.NAdam, "momentum_decay", -1.0, ValueError, r"\['momentum_decay'\] must be"),
    (optim.RAdam, "betas", (-0.1, 0.9), ValueError, r"\['betas'\] must be"),
    (optim.Muon, "ns_coefficients", (1.0, "b", 2.0), TypeError, r"\['ns_coefficients'\] must be"),
]


@pytest.mark.parametrize(("cls", "name", "value", "error", "message"), NUMBERS)
def test_options_are_checked_in_every_call(cls, name, value, error, message):
    optimizer = cls([{"params": [ones(2, 2)]}, {"params": [ones(1, 2)]}], lr=0.1)
    gradients = [torch.ones(2, 2), torch.ones(1, 2)]
    mts_fast.virtual_update(optimizer, gradients)
    optimizer.param_groups[1][name] = value
    refused(optimizer, error, r"optimizer\.param_groups\[1\]" + message, gradients)


def after_one_step(cls, **options):
    p = ones(2, 2)
    p.grad = torch.ones(2, 2)
    optimizer = cls([p], lr=0.1, **options)
    optimizer.step()
    return optimizer, optimizer.state[p]


# class and options, and each tensor that its step reads
STATES = [
    (SGD, {"momentum": 0.9}, ["momentum_buffer"]),
    (Adam, {"amsgrad": True}, ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"]),
    (
        optim.RMSprop,
        {"centered": True, "momentum": 0.9},
        ["square_avg", "grad_avg", "momentum_buffer"],
    ),
    (optim.NAdam, {}, ["exp_avg", "exp_avg_sq"]),
    (optim.RAdam, {}, ["exp_avg", "exp_avg_sq"]),
    (optim.Muon, {}, ["momentum_buffer"]),
]


@pytest.mark.parametrize(("cls", "options", "names"), STATES)
def test_state_of_another_shape_is_refused(cls, options, names):
    gradients = [torch.ones(2, 2)]
    for name in names:
        optimizer, state = after_one_step(cls, **options)
        state[name] = torch.ones(3)
        message = rf"optimizer\.state\[\.\.\.\]\['{name}'\] must be of shape \(2, 2\) on cpu .*load"
        refused(optimizer, ValueError, message, gradients)
        if name == "momentum_buffer" and cls in (SGD, optim.Muon):
            state[name] = "a buffer"
        else:
            del state[name]
        message = rf"optimizer\.state\[\.\.\.\]\['{name}'\] must be a tensor, got .* shape \(2, 2\)"
        refused(optimizer, ValueError, message, gradients)


# class, name of a number in its state
STATE_NUMBERS = [
    (Adam, "step"),
    (optim.RMSprop, "step"),
    (optim.NAdam, "step"),
    (optim.NAdam, "mu_product"),
    (optim.RAdam, "step"),
]


@pytest.mark.parametrize(("cls", "name"), STATE_NUMBERS)
def test_numbers_of_the_state_are_checked(cls, name):
    optimizer, state = after_one_step(cls)
    arg = rf"optimizer\.state\[\.\.\.\]\['{name}'\] must be "
    gradients = [torch.ones(2, 2)]
    for value, error, message in (
        (float("nan"), ValueError, "a finite number at least 0, got nan; load"),
        (torch.tensor(-1.0), ValueError, "a finite number at least 0, got -1.0; load"),
        (torch.ones(2), ValueError, "a tensor of one element, got"),
        ("1", TypeError, "a finite number at least 0, got str"),
    ):
        state[name] = value
        refused(optimizer, error, arg + message, gradients)
    del state[name]
    refused(optimizer, TypeError, arg + "a finite number at least 0, got NoneType", gradients)


def scheduled(cls, p):
    optimizer = cls([p], lr=0.1)
    optim.lr_scheduler.StepLR(optimizer, 10)
    return optimizer


# a step on the object, as torch's schedulers, accelerate or a decorator set it
@pytest.mark.parametrize("cls", [SGD, AdamW])
def test_wrappers_of_step_are_accepted(cls):
    g = torch.ones(2)
    optimizer = scheduled(cls, ones(2))
    assert "step" in vars(optimizer)
    expected = mts_fast.virtual_update(cls([ones(2)], lr=0.1), [g]).parameters[0]
    # torch leaves the wrapper out of copies, since it is bound to the original
    copies = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    # accelerate leaves this on the object after a step with a loss scale
    rebound = cls([ones(2)], lr=0.1)
    rebound.step = rebound.step
    twice = scheduled(cls, ones(2))
    twice.step = twice.step
    optim.lr_scheduler.StepLR(twice, 10)
    timed = cls([ones(2)], lr=0.1)
    timed.step = functools.wraps(timed.step)(lambda *a, **k: None)
    traced = cls([ones(2)], lr=0.1)
    traced.step = torch.compile(traced.step)
    for each in (optimizer, *copies, rebound, twice, timed, traced):
        assert torch.equal(mts_fast.virtual_update(each, [g]).parameters[0], expected)
    scaler = torch.amp.GradScaler("cpu")
    p = optimizer.param_groups[0]["params"][0]
    p.grad = scaler.scale(torch.ones(2))
    scaler.step(optimizer)
    torch.testing.assert_close(p.detach(), expected)
    check_optimizer(optimizer)


def test_a_step_replaced_on_the_object_is_refused():
    message = (
        r"optimizer must be an optimizer that steps as its class does, got SGD with a step\(\)"
    )
    replaced = SGD([ones(2)], lr=0.1)
    replaced.step = lambda: None
    bound = SGD([ones(2)], lr=0.1)
    bound.step = (lambda self, closure=None: None).__get__(bound)
    # a scheduler around it does not hide it
    wrapped = SGD([ones(2)], lr=0.1)
    wrapped.step = (lambda self, closure=None: None).__get__(wrapped)
    optim.lr_scheduler.StepLR(wrapped, 10)
    for optimizer in (replaced, bound, wrapped):
        refused(optimizer, TypeError, message)


@pytest.mark.parametrize("cls", [SGD, Adam, optim.RMSprop, optim.NAdam, optim.RAdam])
@pytest.mark.parametrize("foreach", [True, False])
def test_flags_of_torchs_implementation_change_nothing(cls, foreach):
    g = torch.tensor([1.0, -2.0])
    plain, flagged = cls([ones(2)], lr=0.1), cls([ones(2)], lr=0.1, foreach=foreach)
    pair = [mts_fast.virtual_update(o, [g], along=[g]) for o in (plain, flagged)]
    assert torch.equal(pair[0].parameters[0], pair[1].parameters[0])
    assert torch.equal(pair[0].direction[0], pair[1].direction[0])
    if "fused" in plain.defaults:
        fused = cls([ones(2)], lr=0.1, fused=True)
        fused.param_groups[0]["params"][0].grad = g.clone()
        expected = mts_fast.virtual_update(fused, [g]).parameters[0]
        fused.step()  # differs by an ulp of float32, from fused multiplications
        torch.testing.assert_close(fused.param_groups[0]["params"][0].detach(), expected)


SPARSE = torch.tensor([1.0, 0.0]).to_sparse()
GRADIENTS = [
    (None, TypeError, "gradients must be a list, one per trainable parameter .* got NoneType"),
    (torch.ones(1, 2), TypeError, "gradients must be a list, .* got a float32 tensor"),
    ((g for g in ()), TypeError, "gradients must be a list, .* got generator"),
    ([], ValueError, r"gradients must be one per trainable parameter \(1\), got 0; give a list"),
    (["a"], TypeError, r"gradients\[0\] must be a tensor, got str"),
    ([SPARSE], TypeError, r"gradients\[0\] must be a dense tensor, got .*sparse_coo; .*to_dense"),
    ([torch.ones(2, dtype=torch.complex64)], TypeError, r"gradients\[0\] must be a floating"),
    ([torch.ones(3)], ValueError, r"gradients\[0\] must be of shape \(2,\), got \(3,\); parameter"),
]


@pytest.mark.parametrize(("gradients", "error", "message"), GRADIENTS)
def test_refused_gradients(gradients, error, message):
    with pytest.raises(error, match="virtual_update: " + message):
        mts_fast.virtual_update(SGD([ones(2)], lr=0.1), gradients)


@pytest.mark.parametrize("lr", ["0.1", float("nan"), -1.0, True])
def test_refused_hypergradient_lr(lr):
    optimizer, g = SGD([ones(2)], lr=0.1), [torch.ones(2)]
    message = "virtual_update: hypergradient_lr must be a finite number at least 0, got .*; None"
    with pytest.raises((TypeError, ValueError), match=message):
        mts_fast.virtual_update(optimizer, g).scale(g, lr)
    with pytest.raises((TypeError, ValueError), match=message):
        mts_fast.virtual_update(optimizer, g, along=g, hypergradient_lr=lr)
