"""The virtual update is what torch's own step does, and kappa is minus its derivative."""

import dataclasses

import pytest
import torch
from comparison import assert_bitwise, relative, snapshot
from real_optimizers import real_step, step_with, stepped

import mts_fast
from mts_fast import reference
from mts_fast.ops.virtual_update import optimizer_states

SGD, Adam, AdamW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
MOMENTUM = {"lr": 0.1, "momentum": 0.9}

# every term of an update alone, then the terms that meet in one line of the formula.
OPTIMIZERS = {
    "sgd": (SGD, {"lr": 0.1}),
    "sgd_weight_decay": (SGD, {"lr": 0.1, "weight_decay": 0.05}),
    "sgd_momentum": (SGD, MOMENTUM),
    "sgd_dampening": (SGD, MOMENTUM | {"dampening": 0.3}),
    "sgd_nesterov": (SGD, MOMENTUM | {"nesterov": True}),
    "sgd_maximize": (SGD, {"lr": 0.1, "maximize": True}),
    "sgd_all": (SGD, MOMENTUM | {"nesterov": True, "weight_decay": 0.05, "maximize": True}),
    "sgd_dampened_decay": (SGD, MOMENTUM | {"dampening": 0.3, "weight_decay": 0.05}),
    "adam": (Adam, {"lr": 0.01}),
    "adam_weight_decay": (Adam, {"lr": 0.01, "weight_decay": 0.05, "betas": (0.8, 0.9)}),
    "adam_maximize": (Adam, {"lr": 0.01, "weight_decay": 0.05, "maximize": True}),
    "adam_large_eps": (Adam, {"lr": 0.01, "eps": 0.5}),
    "adamw": (AdamW, {"lr": 0.01, "weight_decay": 0.05}),
    "adamw_maximize": (AdamW, {"lr": 0.01, "weight_decay": 0.05, "maximize": True}),
}
# before the first step there is no state, and the formulas differ; 3 steps make a history.
STEPS_TAKEN = (0, 3)


def gradients_like(parameters, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator).to(p) for p in parameters]


def make(name, device, dtype=torch.float64, steps=0):
    """An optimizer over a matrix, a vector and a scalar, after some real steps."""
    shapes = ((3, 4), (5,), ())
    return stepped(OPTIMIZERS[name], shapes, steps, gradients_like, device, dtype)


@pytest.mark.parametrize("steps", STEPS_TAKEN)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_the_real_step(name, steps, device):
    optimizer, parameters = make(name, device, steps=steps)
    gradients = gradients_like(parameters, 9)
    updated = mts_fast.virtual_update(optimizer, gradients).parameters
    for ours, real in zip(updated, real_step(optimizer, parameters, gradients), strict=True):
        # float64, observed at most 4e-16: the terms are summed in torch's order.
        assert relative(ours, real) < 1e-14


@pytest.mark.parametrize("steps", STEPS_TAKEN)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_float32_is_as_exact_as_torch(name, steps, device):
    single = make(name, device, torch.float32, steps)
    # the truth starts from the float32 parameters and state.
    double = make(name, device, steps=0)
    for p, q in zip(double[1], single[1], strict=True):
        p.data.copy_(q.data)
    double[0].load_state_dict(single[0].state_dict())
    gradients = gradients_like(single[1], 9)
    truth = real_step(*double, [g.double() for g in gradients])
    torchs = real_step(*single, gradients)
    updated = mts_fast.virtual_update(single[0], gradients).parameters
    for ours, theirs, exact in zip(updated, torchs, truth, strict=True):
        # floor: one rounding of the result; observed at most 7e-8.
        assert relative(ours, exact) <= 2 * relative(theirs, exact) + 1.2e-7


@pytest.mark.parametrize("hypergradient_lr", [None, 0.5])  # the optimizer's lr; another one
@pytest.mark.parametrize("steps", STEPS_TAKEN)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_kappa_is_minus_the_jacobian(name, steps, hypergradient_lr, device):
    optimizer, parameters = make(name, device, steps=steps)
    gradients = gradients_like(parameters, 9)
    direction = gradients_like(parameters, 10)
    update = mts_fast.virtual_update(optimizer, gradients)
    scaled = update.scale(direction, hypergradient_lr)
    states = optimizer_states(optimizer)
    for parameter, g, v, kappa_v in zip(parameters, gradients, direction, scaled, strict=True):
        state = states[parameter]
        if hypergradient_lr is not None:
            state = dataclasses.replace(state, lr=hypergradient_lr)
        theta = parameter.detach()
        jacobian = torch.autograd.functional.jacobian(
            lambda x, theta=theta, state=state: reference.virtual_update(theta, x, state), g
        ).reshape(g.numel(), g.numel())
        # the whole Jacobian, so that entries off the diagonal would show.
        expected = -(jacobian @ v.flatten()).reshape(v.shape)
        # observed 6e-16 of lr v / |g|, the size of the terms that autograd subtracts in Adam.
        size = (state.lr * v / g.abs().clamp(max=1.0)).abs()
        assert ((kappa_v - expected).abs() <= 1e-14 * size).all()


def test_groups_keep_their_own_hyperparameters(device):
    _, (a, b, c) = make("sgd", device)
    groups = [
        {"params": [c, a], "lr": 0.5, "momentum": 0.0},
        {"params": [b], "nesterov": True, "weight_decay": 0.1},
    ]
    optimizer = SGD(groups, lr=0.2, momentum=0.9)
    ordered = [c, a, b]
    step_with(optimizer, gradients_like(ordered, 1))
    gradients = gradients_like(ordered, 2)
    update = mts_fast.virtual_update(optimizer, gradients)
    for ours, real in zip(update.parameters, real_step(optimizer, ordered, gradients), strict=True):
        assert relative(ours, real) < 1e-14
    ones = [torch.ones_like(p) for p in ordered]
    # lr without momentum; lr (1 + momentum) with nesterov
    for scaled, kappa in zip(update.scale(ones), (0.5, 0.5, 0.2 * 1.9), strict=True):
        torch.testing.assert_close(scaled, torch.full_like(scaled, kappa), rtol=1e-15, atol=0)


@pytest.mark.parametrize("steps", STEPS_TAKEN)
@pytest.mark.parametrize("name", ["sgd_all", "adamw"])  # both would decay a parameter of gradient 0
def test_parameter_without_gradient_stays(name, steps, device):
    optimizer, parameters = make(name, device, steps=steps)
    gradients = gradients_like(parameters, 9)
    gradients[1] = None
    update = mts_fast.virtual_update(optimizer, gradients)
    assert torch.equal(update.parameters[1], parameters[1])
    for ours, real in zip(
        update.parameters, real_step(optimizer, parameters, gradients), strict=True
    ):
        assert relative(ours, real) < 1e-14
    scaled = update.scale([torch.ones_like(p) for p in parameters])
    assert torch.equal(scaled[1], torch.zeros_like(scaled[1]))
    assert all(s.abs().min() > 0 for s in (scaled[0], scaled[2]))


def test_frozen_parameters_are_left_out(device):
    optimizer, parameters = make("sgd_momentum", device, steps=1)
    parameters[0].requires_grad_(False)
    assert [id(p) for p in mts_fast.ops.trainable_parameters(optimizer)] == [
        id(p) for p in parameters[1:]
    ]
    gradients = gradients_like(parameters[1:], 9)
    updated = mts_fast.virtual_update(optimizer, gradients).parameters
    parameters[0].grad = None
    expected = real_step(optimizer, parameters, gradients)[1:]
    for ours, real in zip(updated, expected, strict=True):
        assert relative(ours, real) < 1e-14


@pytest.mark.parametrize("name", ["sgd_all", "adamw"])  # one of each family
def test_tensor_learning_rate(name, device):
    """A learning rate that is a tensor, as schedules under torch.compile need it."""
    plain, parameters = make(name, device, steps=2)
    with_tensor = make(name, device, steps=2)[0]
    for group in with_tensor.param_groups:
        group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)
    gradients = gradients_like(parameters, 9)
    expected = mts_fast.virtual_update(plain, gradients)
    update = mts_fast.virtual_update(with_tensor, gradients)
    for a, b in zip(update.parameters, expected.parameters, strict=True):
        assert relative(a, b) < 1e-14
    for a, b in zip(update.scale(gradients), expected.scale(gradients), strict=True):
        assert relative(a, b) < 1e-14


@pytest.mark.parametrize("steps", STEPS_TAKEN)
@pytest.mark.parametrize("cls", [Adam, AdamW])
def test_kappa_is_zero_where_the_second_moment_is(cls, steps, device):
    """An entry that never had a gradient, beside one that has: sqrt has no derivative at 0."""
    parameter = torch.nn.Parameter(torch.tensor([1.0, 2.0], device=device))
    optimizer = cls([parameter], lr=0.01)
    gradient = torch.tensor([0.0, 3.0], device=device)
    for _ in range(steps):
        step_with(optimizer, [gradient])
    update = mts_fast.virtual_update(optimizer, [gradient])
    kappa = update.scale([torch.ones(2, device=device)])[0]
    assert kappa[0] == 0.0
    # the other entry is the same as without its neighbour
    alone = torch.nn.Parameter(parameter.detach()[1:].clone())
    optimizer_alone = cls([alone], lr=0.01)
    if steps:
        optimizer_alone.state[alone] = {
            n: v[1:].clone() if v.ndim else v.clone() for n, v in optimizer.state[parameter].items()
        }
    update_alone = mts_fast.virtual_update(optimizer_alone, [gradient[1:]])
    assert kappa[1:] == update_alone.scale([torch.ones(1, device=device)])[0] != 0
    assert relative(update.parameters[0], real_step(optimizer, [parameter], [gradient])[0]) < 1e-6


@pytest.mark.parametrize("name", ["adam", "adam_large_eps", "adam_maximize"])  # eps, sign, decay
def test_float32_kappa_of_the_first_adam_step(name, device):
    """theta - lr g / (|g| + eps) has the slope lr eps / (|g| + eps)^2: 1e-8 of its two terms."""
    optimizer, parameters = make(name, device, torch.float32)
    options = optimizer.param_groups[0]
    gradients = gradients_like(parameters, 9)
    ones = [torch.ones_like(p) for p in parameters]
    kappas = mts_fast.virtual_update(optimizer, gradients).scale(ones)
    for p, g, kappa in zip(parameters, gradients, kappas, strict=True):
        g = g.double() * (-1 if options["maximize"] else 1)
        g = g + options["weight_decay"] * p.detach().double()
        expected = options["lr"] * options["eps"] / (g.abs() + options["eps"]) ** 2
        if options["maximize"]:
            expected = -expected
        torch.testing.assert_close(kappa.double(), expected, rtol=1e-6, atol=0)  # observed 4e-7


@pytest.mark.parametrize("steps", STEPS_TAKEN)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_nothing_of_the_optimizer_changes(name, steps, device):
    optimizer, parameters = make(name, device, steps=steps)
    module = torch.nn.ParameterList(parameters)
    before = snapshot(module=module, optimizer=optimizer, device=device, gradients=True)
    gradients = gradients_like(parameters, 9)
    update = mts_fast.virtual_update(optimizer, gradients)
    # writing to the results must not change the parameters either
    for tensor in [*update.scale(gradients), *update.parameters]:
        tensor.zero_()
    after = snapshot(module=module, optimizer=optimizer, device=device, gradients=True)
    assert_bitwise(after, before)
    assert_bitwise(gradients, gradients_like(parameters, 9))


class Renamed(Adam):
    """Adds nothing to Adam."""


def test_subclass_that_keeps_step_is_served(device):
    """Its first instance must not look like an override: torch wraps `step` at that moment."""
    parameter = torch.nn.Parameter(torch.ones(2, device=device))
    gradient = torch.tensor([1.0, -2.0], device=device)
    # torch does this at the first instance of Adam, which other tests have made already
    Renamed.step = torch.optim.Optimizer.profile_hook_step(Adam.step)
    updated = mts_fast.virtual_update(Renamed([parameter], lr=0.1), [gradient]).parameters[0]
    assert torch.equal(
        updated, mts_fast.virtual_update(Adam([parameter], lr=0.1), [gradient]).parameters[0]
    )


@pytest.mark.parametrize(
    "gradients",
    [
        [torch.ones(2)],  # too few
        [torch.ones(2), torch.ones(3), torch.ones(1)],  # too many
        [torch.ones(2), torch.ones(2)],  # another shape
        [torch.ones(2), torch.ones(3, 1)],  # the right number of entries in another shape
        [None, None],  # a loss that depends on nothing
    ],
)
def test_refused_gradients(gradients):
    parameters = [torch.nn.Parameter(torch.ones(n)) for n in (2, 3)]
    with pytest.raises(ValueError, match=r"virtual_update: gradients(\[1\])? must be"):
        mts_fast.virtual_update(SGD(parameters, lr=0.1), gradients)
