"""Wrong arguments of MTSStep and of its calls: errors name the argument, and nothing changes."""

import copy

import numpy as np
import pytest
import torch
from interruptions import differences, whole_state
from step_run import StepRun
from torch import nn

import mts_fast

CPU = torch.device("cpu")


def parts():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    selector = mts_fast.Selector(4, 3, hidden=(8,))
    return {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "selector": selector,
        "selector_optimizer": torch.optim.AdamW(selector.parameters(), lr=1e-2),
    }


def swapped(p):
    p["optimizer"], p["selector_optimizer"] = p["selector_optimizer"], p["optimizer"]


def frozen_selector(p):
    p["selector"].requires_grad_(False)


def shared_parameters(p):
    p["optimizer"].add_param_group({"params": list(p["selector"].parameters())})


def other(build):
    return lambda p: torch.optim.AdamW(build().parameters(), lr=1e-2)


# name -> (argument that is replaced, its replacement, error, message)
WRONG_PARTS = {
    "no model": ("model", lambda p: None, TypeError, r"model must be a torch\.nn\.Module"),
    "function": ("model", lambda p: torch.tanh, TypeError, "model must be a torch"),
    "class": ("model", lambda p: nn.Linear, TypeError, "call the class to make one"),
    "lazy": (
        "model",
        lambda p: nn.Sequential(nn.LazyLinear(3)),
        ValueError,
        "model must be initialised, got '0.weight' without a shape; run it on a batch first",
    ),
    "no selector": ("selector", lambda p: None, TypeError, "selector must be a torch"),
    "model as selector": ("selector", lambda p: p["model"], ValueError, "another module than mod"),
    "no optimizer": ("optimizer", lambda p: None, TypeError, "optimizer must be a torch.optim"),
    "no second": ("selector_optimizer", lambda p: None, TypeError, "selector_optimizer must be a"),
    "the same": ("selector_optimizer", lambda p: p["optimizer"], ValueError, "selector_optimizer"),
    "of another selector": (
        "selector_optimizer",
        other(lambda: mts_fast.Selector(4, 3)),
        ValueError,
        "selector_optimizer must be of the trainable parameters of selector, got one that holds no",
    ),
    "of another model": (
        "optimizer",
        lambda p: torch.optim.SGD(nn.Linear(4, 3).parameters(), lr=0.1),
        ValueError,
        "optimizer must be of the trainable parameters of model, got one that holds none",
    ),
    "closure": (
        "selector_optimizer",
        lambda p: torch.optim.LBFGS(p["selector"].parameters()),
        ValueError,
        "selector_optimizer must be stepped without a closure, got LBFGS",
    ),
    "differentiable": (
        "selector_optimizer",
        lambda p: torch.optim.SGD(p["selector"].parameters(), lr=0.1, differentiable=True),
        ValueError,
        "selector_optimizer must be without differentiable",
    ),
    "capturable": (
        "selector_optimizer",
        lambda p: torch.optim.Adam(p["selector"].parameters(), capturable=True, foreach=False),
        ValueError,
        "selector_optimizer must be capturable on a GPU only",
    ),
}


@pytest.mark.parametrize("case", WRONG_PARTS)
def test_wrong_parts(case):
    name, make, error, message = WRONG_PARTS[case]
    arguments = parts()
    arguments[name] = make(arguments)
    with pytest.raises(error, match=message) as seen:
        mts_fast.MTSStep(**arguments)
    assert str(seen.value).startswith("MTSStep: ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swapped, "optimizer must be of the trainable parameters of model"),
        (frozen_selector, "selector must be given trainable parameters"),
        (shared_parameters, "selector_optimizer must be apart from optimizer"),
    ],
)
def test_parts_that_do_not_belong_together(change, message):
    arguments = parts()
    change(arguments)
    with pytest.raises(ValueError, match=f"MTSStep: {message}"):
        mts_fast.MTSStep(**arguments)


SCHEDULERS = {
    "metric": (
        torch.optim.lr_scheduler.ReduceLROnPlateau,
        ValueError,
        "stepped without arguments, got ReduceLROnPlateau, whose step wants metrics",
    ),
    "text": (lambda o: "cosine", TypeError, "selector_scheduler must be a torch LRScheduler"),
    "of another": (
        lambda o: torch.optim.lr_scheduler.ExponentialLR(parts()["optimizer"], 0.9),
        ValueError,
        "selector_scheduler must be of selector_optimizer",
    ),
}


@pytest.mark.parametrize("case", SCHEDULERS)
def test_schedulers(case):
    make, error, message = SCHEDULERS[case]
    arguments = parts()
    with pytest.raises(error, match=message):
        mts_fast.MTSStep(**arguments, selector_scheduler=make(arguments["selector_optimizer"]))


NUMBERS = [-1, 0, float("nan"), float("inf"), "1", True, None]
OPTIONS = [
    *(("max_grad_norm", v) for v in NUMBERS if v is not None),
    *(("hypergradient_lr", v) for v in NUMBERS if v is not None),
    *(("online_momentum", v) for v in (1.0, -0.1, "0.9", float("nan"))),
    *(("warmup_steps", v) for v in (0.2, "200", None, -1, True)),
    *(("selector_every", v) for v in (0, 1.5, "2", None)),
    *((name, "no") for name in ("online_features", "track_gsnr", "cuda_graph", "atomic")),
    *((name, "cross_entropy") for name in ("loss", "val_loss", "val_objective")),
    ("scaler", 2.0),
    ("feature_layer", 3),
    ("micro_batch", 0),
    ("micro_batch", 2.5),
    ("memory", "little"),
    ("schedule", None),
]


@pytest.mark.parametrize(("name", "value"), OPTIONS)
def test_options_one_by_one(name, value):
    with pytest.raises((TypeError, ValueError), match=f"^MTSStep: {name} must be"):
        mts_fast.MTSStep(**parts(), **{name: value})


@pytest.mark.parametrize(
    "value",
    [[1.0, 1.0, 2.0], np.array([1.0, 1.0, 2.0]), torch.tensor([1, 1, 2]), (1, 1, 2)],
)
def test_class_weights_of_any_kind(value):
    step = mts_fast.MTSStep(**parts(), class_weight=value)
    assert step.class_weight.dtype == torch.float32
    assert step.class_weight.tolist() == [1.0, 1.0, 2.0]


@pytest.mark.parametrize(
    "value",
    [
        [1.0, -1.0, 1.0],
        [1.0, float("nan"), 1.0],
        [1.0, float("inf"), 1.0],
        [1.0, 1.0],
        1.0,
        torch.ones(3, 1),
        "balanced",
        torch.ones(3).bool(),
    ],
)
def test_class_weights_that_are_none(value):
    with pytest.raises((TypeError, ValueError), match="MTSStep: class_weight must be"):
        mts_fast.MTSStep(**parts(), class_weight=value)
    step = mts_fast.MTSStep(**parts())
    with pytest.raises((TypeError, ValueError), match="MTSStep: class_weight must be"):
        step.class_weight = value
    assert step.class_weight is None


def nan_selector(run):
    with torch.no_grad():
        next(run.selector.parameters()).fill_(torch.nan)


def diverging_selector(run):
    run.selector_optimizer.param_groups[0]["lr"] = 1e20


def negative_rate(run):
    run.optimizer.param_groups[0]["lr"] = -0.1


class Broken(nn.Module):
    """A selector whose output is any function of its weights."""

    def __init__(self, result):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))
        self.result = result

    def forward(self, features, classes, is_synthetic):
        return self.result(self.w * torch.ones(len(classes)))


# name -> (change of a run before the call, options of the run, message)
WRONG_CALLS = {
    "nan selector": (nan_selector, {}, "selector's output must be finite.*lower its learning rate"),
    "nan selector, no teaching": (
        nan_selector,
        {"selector_every": 7, "steps": 1},
        "selector's output must be finite",
    ),
    "diverges": (diverging_selector, {}, "selector's output after its step must be finite"),
    "negative lr": (negative_rate, {}, r"param_groups\[0\]\['lr'\] must be a finite number at lea"),
    "val labels": (
        {"val_labels": torch.full((9,), -100)},
        {},
        "val_labels must be classes that count something",
    ),
    "bool labels": ({"labels": torch.ones(12).bool()}, {}, "labels must be an integer tensor, got"),
    "float val labels": ({"val_labels": torch.ones(9)}, {}, "val_labels must be an integer tensor"),
    "one-hot val labels": (
        {"val_labels": torch.eye(3)[torch.arange(9) % 3].long()},
        {},
        r"val_labels must be of shape \(9,\), class indices",
    ),
    "meta": ({"labels": torch.ones(12, device="meta").long()}, {}, "labels must be on a device th"),
    "tuple": ({"selector_batch": (1, 2)}, {}, "selector_batch must be a SelectorBatch"),
    "val weights": ({"val_weights": -torch.ones(9)}, {}, "val_weights must be 0 or more"),
    "no groups": ({}, {"val_objective": "worst_group"}, "val_groups must be given with this val"),
    "few validation samples": (
        {"val_inputs": torch.randn(2, 4), "val_labels": torch.arange(2)},
        {},
        r"online_k must be at most the validation batch \(2\), got 3",
    ),
    "sparse": ({"features": torch.ones(12, 2).to_sparse()}, {}, "features must be a dense tensor"),
}


@pytest.mark.parametrize("case", WRONG_CALLS)
def test_wrong_calls_change_nothing(case):
    change, options, message = WRONG_CALLS[case]
    options = dict(options)
    steps = options.pop("steps", 0)
    run = StepRun(CPU, **options)
    run.step.steps = steps
    arguments = run.arguments(0)
    arguments |= change if isinstance(change, dict) else {}
    if callable(change):
        change(run)
    before = whole_state(run)
    with pytest.raises((TypeError, ValueError), match=f"MTSStep: .*{message}"):
        run.step(**arguments)
    after = whole_state(run)
    nan = case.startswith("nan")  # NaN differs from itself
    assert set(differences(before, after)) <= ({"selector"} if nan else set())


SELECTORS = {
    "tuple": (lambda z: (z, z), "selector's output must be floating-point logits"),
    "none": (lambda z: None, "selector's output must be floating-point logits"),
    "number": (lambda z: 1.0, "selector's output must be floating-point logits"),
    "integers": (lambda z: z.long(), "selector's output must be floating-point logits"),
    "complex": (lambda z: z.to(torch.complex64), "selector's output must be floating-point log"),
    "two": (lambda z: torch.stack([z, z], 1), "selector's output must be floating-point logits"),
    "detached": (lambda z: z.detach(), "dependent on the selector's trainable parameters"),
}


@pytest.mark.parametrize("case", SELECTORS)
def test_selectors_that_return_something_else(case):
    result, message = SELECTORS[case]
    run = StepRun(CPU)
    selector = Broken(result)
    step = mts_fast.MTSStep(
        run.model, run.optimizer, selector, torch.optim.SGD(selector.parameters(), lr=0.1)
    )
    before = copy.deepcopy(run.model.state_dict())
    with pytest.raises((TypeError, ValueError), match=message):
        step(**run.arguments(0))
    assert all(torch.equal(before[k], v) for k, v in run.model.state_dict().items())


LOSSES = {
    "detached": lambda o, y: nn.functional.cross_entropy(o, y, reduction="none").detach(),
    "constant": lambda o, y: torch.ones(len(y)),
    "errors": lambda o, y: (o.argmax(1) != y).float(),
    "integers": lambda o, y: (o.argmax(1) != y).long(),
    "complex": lambda o, y: nn.functional.cross_entropy(o, y, reduction="none") * 1j,
}


@pytest.mark.parametrize("model", ["mlp", "batchnorm"])
@pytest.mark.parametrize("case", LOSSES)
def test_losses_that_cannot_be_differentiated(case, model):
    run = StepRun(CPU, model=model, loss=LOSSES[case])
    before = whole_state(run)
    with pytest.raises((TypeError, ValueError), match=r"MTSStep: loss\(output, labels\) must be"):
        run.step(**run.arguments(0))
    assert not differences(before, whole_state(run))


@pytest.mark.parametrize("model", ["mlp", "batchnorm"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_call_without_gradients(mode, model):
    run = StepRun(CPU, model=model)
    before = whole_state(run)
    with mode(), pytest.raises(RuntimeError, match="the call must be made with gradients enabled"):
        run.step(**run.arguments(0))
    assert not differences(before, whole_state(run))
    # the engine is then chosen as if the failed call had not happened
    other = StepRun(CPU, model=model)
    run.step(**run.arguments(1))
    torch.set_rng_state(before["torch"])
    other.step(**other.arguments(1))
    assert not differences(whole_state(run), whole_state(other))


@pytest.mark.parametrize("kind", ["unfreeze", "freeze", "add"])
@pytest.mark.parametrize("every", [1, 3])
def test_parameters_that_change_in_mid_run(kind, every):
    """The step continues as one that was built with the new parameters."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    first = [*model[0].parameters()]
    model[0].requires_grad_(kind == "freeze")
    held = model.parameters() if kind != "add" else model[2].parameters()
    optimizer = torch.optim.SGD(held, lr=0.1, momentum=0.9)
    run = StepRun(CPU)
    selector = run.selector
    step = mts_fast.MTSStep(
        model,
        optimizer,
        selector,
        torch.optim.AdamW(selector.parameters(), lr=0.05),
        selector_every=every,
    )
    step(**run.arguments(0))
    model[0].requires_grad_(kind != "freeze")
    if kind == "add":
        optimizer.add_param_group({"params": first, "lr": 0.01})
    twins = copy.deepcopy((model, optimizer, selector, step.selector_optimizer))
    other = mts_fast.MTSStep(*twins, selector_every=every)
    other.steps = 1
    before = [p.clone() for p in first]
    for seed in (1, 2, 3):
        result, expected = step(**run.arguments(seed)), other(**run.arguments(seed))
        assert torch.equal(result.losses, expected.losses)
    moved = [not torch.equal(p, b) for p, b in zip(first, before, strict=True)]
    assert all(moved) if kind != "freeze" else not any(moved)
    for p, q in zip(model.parameters(), twins[0].parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_stale_gradient_of_a_frozen_layer_is_cleared():
    run = StepRun(CPU)
    run.model[0].weight.grad = torch.ones_like(run.model[0].weight)
    run.model[0].requires_grad_(False)
    before = run.model[0].weight.clone()
    run.step(**run.arguments(0))
    assert torch.equal(run.model[0].weight, before) and run.model[0].weight.grad is None
