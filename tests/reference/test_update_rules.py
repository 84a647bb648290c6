"""Every update rule against one step of the real optimizer, and its kappa against autograd."""

import copy

import pytest
import torch
from comparison import assert_bitwise, relative
from torch import nn

import mts_fast
from mts_fast.ops import register_update_rule
from mts_fast.ops.update_rules import _rules
from mts_fast.ops.virtual_update import optimizer_states

OPTIM = torch.optim
# name -> (class, options); together they name every option of these optimizers that changes a step
CASES = {
    "sgd_dampening": (OPTIM.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
    "adam_amsgrad": (OPTIM.Adam, {"lr": 0.1, "amsgrad": True, "weight_decay": 0.1}),
    "adamw_amsgrad": (OPTIM.AdamW, {"lr": 0.1, "amsgrad": True, "maximize": True}),
    "rmsprop": (OPTIM.RMSprop, {"lr": 0.1}),
    "rmsprop_all": (
        OPTIM.RMSprop,
        {"lr": 0.1, "momentum": 0.9, "centered": True, "weight_decay": 0.1, "maximize": True},
    ),
    "rmsprop_centered": (OPTIM.RMSprop, {"lr": 0.1, "centered": True, "alpha": 0.9}),
    "nadam": (OPTIM.NAdam, {"lr": 0.1}),
    "nadam_coupled": (OPTIM.NAdam, {"lr": 0.1, "weight_decay": 0.1, "momentum_decay": 0.1}),
    "nadam_decoupled": (
        OPTIM.NAdam,
        {"lr": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True},
    ),
    "radam": (OPTIM.RAdam, {"lr": 0.1}),  # its first five steps are not rectified
    "radam_rectified": (OPTIM.RAdam, {"lr": 0.1, "betas": (0.9, 0.9), "weight_decay": 0.1}),
    "radam_decoupled": (
        OPTIM.RAdam,
        {"lr": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True},
    ),
}
STEPS_TAKEN = (0, 1, 4, 7)  # nothing kept; a first moment; and further, past RAdam's warm-up


class Lion(torch.optim.Optimizer):
    """Sign of an interpolated momentum (Chen et al. 2023), as it is published."""

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["exp_avg"] = torch.zeros_like(p)
                beta1, beta2 = group["betas"]
                p.mul_(1 - group["lr"] * group["weight_decay"])
                update = state["exp_avg"] * beta1 + p.grad * (1 - beta1)
                p.add_(update.sign(), alpha=-group["lr"])
                state["exp_avg"].mul_(beta2).add_(p.grad, alpha=1 - beta2)


def made(case, steps, device, shapes=((3, 2), (4,), ())):
    """An optimizer after some steps, and a gradient for the next."""
    build, options = CASES[case]
    torch.manual_seed(4)
    parameters = [nn.Parameter(torch.randn(s, dtype=torch.float64, device=device)) for s in shapes]
    groups = [{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.03}]
    optimizer = build(groups, **options)
    for _ in range(steps):
        for p in parameters:
            p.grad = torch.randn_like(p)
        optimizer.step()
    return optimizer, parameters, [torch.randn_like(p) for p in parameters]


def real_step(optimizer, gradients):
    """What the optimizer itself makes of the gradients, on a copy."""
    twin = copy.deepcopy(optimizer)
    parameters = [p for g in twin.param_groups for p in g["params"]]
    for p, g in zip(parameters, gradients, strict=True):
        p.grad = g.clone()
    twin.step()
    return [p.detach() for p in parameters]


@pytest.mark.parametrize("steps", STEPS_TAKEN)
@pytest.mark.parametrize("case", CASES)
def test_theta_is_that_of_the_real_step(case, steps, device):
    optimizer, parameters, gradients = made(case, steps, device)
    before = copy.deepcopy((optimizer.state_dict(), parameters))
    after = mts_fast.virtual_update(optimizer, gradients).parameters
    for found, expected in zip(after, real_step(optimizer, gradients), strict=True):
        assert relative(found, expected) < 1e-12  # observed 3e-16
    assert_bitwise((optimizer.state_dict(), parameters), before)


@pytest.mark.parametrize("lr", [None, 0.7])
@pytest.mark.parametrize("steps", STEPS_TAKEN)
@pytest.mark.parametrize("case", CASES)
def test_kappa_is_the_derivative_of_the_real_step(case, steps, lr, device):
    """Central differences of torch's own step: nothing of the rule's derivation is in them."""
    optimizer, _, gradients = made(case, steps, device)
    v = [torch.randn_like(g) for g in gradients]
    found = mts_fast.virtual_update(optimizer, gradients).scale(v, lr)
    if lr is not None:
        for group in optimizer.param_groups:
            group["lr"] = lr
    h = 1e-6
    for i, g in enumerate(gradients):
        for j in range(g.numel()):
            ends = []
            for sign in (1, -1):
                moved = [t.clone() for t in gradients]
                moved[i].view(-1)[j] += sign * h
                ends.append(real_step(optimizer, moved)[i])
            column = -((ends[0] - ends[1]) / (2 * h) * v[i]).sum()
            # observed 2e-9; where amsgrad's maximum changes hands within h, it would not be small
            assert abs(found[i].view(-1)[j] - column) <= 1e-6 * max(1.0, abs(column))
    assert found.masked_entries == 0


def test_muon_orthogonalises_as_torch_does(device):
    """theta' to a rounding of its last sum; kappa v as differences of the iteration in float64."""
    torch.manual_seed(0)
    for shape in ((4, 3), (3, 5)):
        for options in ({}, {"nesterov": False, "adjust_lr_fn": "match_rms_adamw"}):
            p = nn.Parameter(torch.randn(shape, device=device))
            optimizer = OPTIM.Muon([p], lr=0.1, weight_decay=0.1, **options)
            for _ in range(3):
                p.grad = torch.randn_like(p)
                optimizer.step()
            g, v = torch.randn_like(p), torch.randn_like(p)
            update = mts_fast.virtual_update(optimizer, [g])
            expected = real_step(optimizer, [g])[0]
            assert relative(update.parameters[0], expected) < 1e-6  # observed 6e-8
            # d<theta', v>/dg by differences in float64: the iteration is smooth there
            group, buffer = optimizer.param_groups[0], optimizer.state[p]["momentum_buffer"]
            truth = torch.zeros_like(g, dtype=torch.float64)
            for j in range(g.numel()):
                ends = []
                for sign in (1, -1):
                    moved = g.double().clone()
                    moved.view(-1)[j] += sign * 1e-6
                    ends.append((orthogonal_step(moved, buffer.double(), group) * v).sum())
                truth.view(-1)[j] = (ends[0] - ends[1]) / 2e-6
            assert relative(update.scale([v])[0], truth) < 1e-4  # float32; observed 4e-6


def orthogonal_step(g, buffer, group):
    """Muon's step of a matrix as its paper writes it: lr times the orthogonalised momentum."""
    momentum = group["momentum"]
    mean = buffer + (1 - momentum) * (g - buffer)
    x = g + momentum * (mean - g) if group["nesterov"] else mean
    a, b, c = group["ns_coefficients"]
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm()
    for _ in range(group["ns_steps"]):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    x = x.T if tall else x
    rows, columns = x.shape
    scale = max(1, rows / columns) ** 0.5
    if group["adjust_lr_fn"] == "match_rms_adamw":
        scale = 0.2 * max(rows, columns) ** 0.5
    return group["lr"] * scale * x


def test_muon_refuses_vectors(device):
    with pytest.raises(ValueError):
        OPTIM.Muon([nn.Parameter(torch.ones(3, device=device))])


@pytest.fixture
def lion():
    register_update_rule(Lion, mts_fast.LionRule(softness=1.0))
    yield
    del _rules[Lion]


def test_lion_looks_ahead_along_its_sign(lion, device):
    p = nn.Parameter(torch.tensor([1.0, -2.0, 0.5], device=device))
    optimizer = Lion([p], lr=0.1, weight_decay=0.1)
    p.grad = torch.tensor([0.3, -0.1, 0.2], device=device)
    optimizer.step()
    g = torch.tensor([-1.0, 1.0, 2.0], device=device)
    update = mts_fast.virtual_update(optimizer, [g])
    assert relative(update.parameters[0], real_step(optimizer, [g])[0]) < 1e-6
    # kappa of the soft sign c / sqrt(c^2 + mean(c^2)), the mean held fixed
    c = 0.9 * optimizer.state[p]["exp_avg"] + 0.1 * g
    width = (c * c).mean()
    expected = 0.1 * 0.1 * width / (c * c + width) ** 1.5
    assert relative(update.scale([torch.ones_like(g)])[0], expected) < 1e-6
    register_update_rule(Lion, mts_fast.LionRule())
    with pytest.raises(ValueError, match=r"sign is 0 almost everywhere.*softness"):
        mts_fast.virtual_update(optimizer, [g])


def test_rules_of_ones_own(device):
    class Clipped(OPTIM.SGD):
        """Steps along tanh of the gradient."""

        def step(self, closure=None):
            with torch.no_grad():
                for group in self.param_groups:
                    for p in group["params"]:
                        p -= group["lr"] * p.grad.tanh()

    p = nn.Parameter(torch.ones(3, dtype=torch.float64, device=device))
    optimizer = Clipped([p], lr=0.5)
    g, v = torch.tensor([0.1, -2.0, 3.0]).to(p), torch.tensor([1.0, 2.0, -1.0]).to(p)
    with pytest.raises(TypeError, match=r"Clipped, which overrides step.*register_update_rule"):
        mts_fast.virtual_update(optimizer, [g])

    class Rule(mts_fast.UpdateRule):
        def updated(self, parameter, gradient, group, state):
            return parameter - group["lr"] * gradient.tanh()

    register_update_rule(Clipped, Rule())
    try:
        update = mts_fast.virtual_update(optimizer, [g])
        assert torch.equal(update.parameters[0], real_step(optimizer, [g])[0])
        assert relative(update.scale([v])[0], 0.5 * (1 - g.tanh() ** 2) * v) < 1e-15
        step = mts_fast.MTSStep(
            *whole_step(p, optimizer), online_features=False, loss=lambda o, y: (o - y) ** 2
        )
        x = torch.randn(6, 3, dtype=torch.float64, device=device)
        result = step(
            x, x.sum(1), val_inputs=x[:2], val_labels=x[:2].sum(1), classes=torch.zeros(6).long()
        )
        assert result.self_check < 1e-12
    finally:
        del _rules[Clipped]


def whole_step(parameter, optimizer):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = parameter

        def forward(self, x):
            return x @ self.w

    selector = mts_fast.Selector(0, 1).double()
    return Model(), optimizer, selector, OPTIM.AdamW(selector.parameters(), lr=1e-3)


@pytest.mark.parametrize("rule", [object(), torch.optim.Adagrad, None])
def test_what_is_no_rule_is_refused(rule):
    with pytest.raises((TypeError, ValueError), match="register_update_rule: rule must be"):
        register_update_rule(Lion, rule)


def noisy_bias():
    """A convolution whose bias stands before a BatchNorm, and a batch for it."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    )
    return model, torch.randn(16, 1, 6, 6), torch.arange(16) % 3


@pytest.mark.parametrize("make", [OPTIM.Adam, OPTIM.AdamW, OPTIM.RMSprop, OPTIM.NAdam])
def test_a_bias_before_batchnorm_is_noise(make, backend):
    model, x, y = noisy_bias()
    optimizer = make(model.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    loss = nn.functional.cross_entropy(model(x), y)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    bias = next(i for i, (n, _) in enumerate(model.named_parameters()) if n == "0.bias")
    assert 0 < gradients[bias].abs().max() < 1e-7
    v = [torch.ones_like(g) for g in gradients]
    update = mts_fast.virtual_update(optimizer, list(gradients), along=v)
    assert not update.direction[bias].any()
    zeros = sum(int((d == 0).sum()) for d in update.direction)
    assert update.direction.masked_entries == zeros >= 4
    assert update.scale(v).masked_entries == zeros


def test_a_rare_row_is_no_noise(backend):
    """An embedding row whose gradient is 1e-5 of the largest learns like any other."""
    table = nn.Parameter(torch.ones(3, 2))
    optimizer = OPTIM.AdamW([table], lr=1e-2)
    table.grad = torch.tensor([[1.0, -1.0], [1e-5, 2e-5], [0.0, 0.0]])
    optimizer.step()
    update = mts_fast.virtual_update(optimizer, [table.grad], along=[torch.ones(3, 2)])
    assert (update.direction[0][:2] != 0).all() and not update.direction[0][2].any()
    assert update.direction.masked_entries == 2
    (state,) = optimizer_states(optimizer).values()
    expected = mts_fast.reference.kappa(table.detach(), table.grad, state)
    assert relative(update.direction[0], expected) < 1e-6


def test_a_nan_is_not_masked(backend):
    """Nor does it make others noise: it shows in kappa v."""
    p = nn.Parameter(torch.ones(3))
    optimizer = OPTIM.Adam([p], lr=1e-2)
    p.grad = torch.tensor([1.0, 1e-9, 1.0])
    optimizer.step()
    g = torch.tensor([1.0, 1e-9, torch.nan])
    update = mts_fast.virtual_update(optimizer, [g], along=[torch.ones(3)])
    assert update.direction[0].isnan().tolist() == [False, False, True]
    assert update.direction.masked_entries == 0
