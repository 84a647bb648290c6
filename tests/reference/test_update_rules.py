"""Each update rule equals torch's step; kappa v is minus its transposed derivative times v."""

import copy

import pytest
import torch
from comparison import assert_bitwise, relative, snapshot
from real_optimizers import real_step, step_with, stepped

import mts_fast
from mts_fast import reference
from mts_fast.ops import update_rules
from mts_fast.ops.virtual_update import optimizer_states
from mts_fast.reference.update_rules.states import LiveStates

optim = torch.optim
DECAY = {"weight_decay": 0.05}
BETAS = {"betas": (0.8, 0.9)}


class Lion(optim.Optimizer):
    """As in arXiv 2302.06675, Algorithm 2, and with `maximize`."""

    def __init__(self, params, lr=0.01, betas=(0.9, 0.99), weight_decay=0.0, maximize=False):
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                g = -p.grad if group["maximize"] else p.grad
                mean = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                update = (mean * beta1 + g * (1 - beta1)).sign()
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * update)
                mean.mul_(beta2).add_(g, alpha=1 - beta2)


class SmallLion(Lion):
    """Served with a soft sign."""


@pytest.fixture(autouse=True)
def registered_lions(monkeypatch):
    """For these tests alone."""
    monkeypatch.setattr(update_rules, "_rules", dict(update_rules._rules))
    mts_fast.register_update_rule(Lion, mts_fast.LionRule())
    mts_fast.register_update_rule(SmallLion, mts_fast.LionRule(softness=0.5))


# every option alone, then the options that meet in one line of a formula
RULES = {
    "adam_amsgrad": (optim.Adam, {"lr": 0.01, "amsgrad": True} | BETAS),
    "adamw_amsgrad": (optim.AdamW, {"lr": 0.01, "amsgrad": True, "maximize": True} | DECAY),
    "rmsprop": (optim.RMSprop, {"lr": 0.01}),
    "rmsprop_decay": (optim.RMSprop, {"lr": 0.01, "alpha": 0.8} | DECAY),
    "rmsprop_centered": (optim.RMSprop, {"lr": 0.01, "centered": True}),
    "rmsprop_momentum": (optim.RMSprop, {"lr": 0.01, "momentum": 0.9, "eps": 0.1}),
    "rmsprop_all": (
        optim.RMSprop,
        {"lr": 0.01, "centered": True, "momentum": 0.9, "maximize": True, "alpha": 0.7} | DECAY,
    ),
    "nadam": (optim.NAdam, {"lr": 0.01}),
    "nadam_decay": (optim.NAdam, {"lr": 0.01, "momentum_decay": 0.1} | DECAY | BETAS),
    "nadam_decoupled": (
        optim.NAdam,
        {"lr": 0.01, "decoupled_weight_decay": True, "maximize": True} | DECAY,
    ),
    # divides from its sixth step on; with beta2 = 0.5 never
    "radam": (optim.RAdam, {"lr": 0.01}),
    "radam_decay": (optim.RAdam, {"lr": 0.01, "betas": (0.8, 0.95), "eps": 0.1} | DECAY),
    "radam_decoupled": (
        optim.RAdam,
        {"lr": 0.01, "decoupled_weight_decay": True, "maximize": True} | DECAY,
    ),
    "radam_never_divides": (optim.RAdam, {"lr": 0.01, "betas": (0.9, 0.5)}),
    "lion": (SmallLion, {"lr": 0.01}),
    "lion_all": (SmallLion, {"lr": 0.01, "maximize": True} | DECAY | BETAS),
    "muon": (optim.Muon, {"lr": 0.01}),
    "muon_plain": (optim.Muon, {"lr": 0.01, "nesterov": False, "weight_decay": 0.0}),
    "muon_adamw_rms": (
        optim.Muon,
        {"lr": 0.01, "adjust_lr_fn": "match_rms_adamw", "momentum": 0.5, "ns_steps": 3},
    ),
}
# no state; one step; a history; enough for RAdam to divide
STEPS_TAKEN = (0, 1, 4, 7)
# rows and columns: wide and tall, which Muon treats differently; one entry; no dimension
MATRICES = ((3, 5), (6, 2), (1, 1))
SHAPES = (*MATRICES, (4,), (1,), ())


def shapes_of(name):
    return MATRICES if name.startswith("muon") else SHAPES


def gradients_like(parameters, seed):
    generator = torch.Generator().manual_seed(seed)
    # the size changes from step to step, so that amsgrad's maximum is sometimes old, sometimes new
    size = (1.0, 3.0, 0.5, 2.0)[seed % 4]
    return [size * torch.randn(p.shape, generator=generator).to(p) for p in parameters]


def make(name, steps, device, **more):
    return stepped(RULES[name], shapes_of(name), steps, gradients_like, device, **more)


@pytest.mark.parametrize("steps", STEPS_TAKEN)
@pytest.mark.parametrize("name", RULES)
def test_equals_the_real_step(name, steps, device):
    optimizer, parameters = make(name, steps, device)
    gradients = gradients_like(parameters, 9)
    before = snapshot(optimizer=optimizer, device=device)
    update = mts_fast.virtual_update(optimizer, gradients)
    update.scale(gradients)
    assert_bitwise(snapshot(optimizer=optimizer, device=device), before)
    assert_bitwise(gradients, gradients_like(parameters, 9))
    for ours, real in zip(
        update.parameters, real_step(optimizer, parameters, gradients), strict=True
    ):
        # observed 3e-16: torch sums in another order
        assert relative(ours, real) < 1e-12


def smooth(name, state):
    """theta' as a differentiable function of (parameter, gradient). Lion and Muon, whose steps have
    no useful derivative, are written out."""
    if not name.startswith(("lion", "muon")):
        return lambda p, g: reference.virtual_update(p, g, state)
    group, tensors = state.group, state.state
    if name.startswith("lion"):

        def soft_lion(p, g):
            g = -g if group["maximize"] else g
            c = (1 - group["betas"][0]) * g
            if tensors:
                c = group["betas"][0] * tensors["exp_avg"] + c
            soft = c / (c**2 + 0.25 * (c**2).mean().detach()).sqrt()
            return p * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * soft

        return soft_lion

    def muon_in_float64(p, g):
        mean = group["momentum"] * tensors.get("momentum_buffer", 0.0) + (1 - group["momentum"]) * g
        x = group["momentum"] * mean + (1 - group["momentum"]) * g if group["nesterov"] else mean
        x = x / x.norm()
        a, b, c = group["ns_coefficients"]
        for _ in range(group["ns_steps"]):
            # x may be tall: multiplied from the other side the polynomial is the same matrix
            x = a * x + b * (x @ x.T @ x) + c * (x @ x.T @ x @ x.T @ x)
        rows, columns = p.shape
        ratio = 0.2 * max(rows, columns) ** 0.5
        if group["adjust_lr_fn"] is None:
            ratio = max(1, rows / columns) ** 0.5
        return p * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * ratio * x

    return muon_in_float64


@pytest.mark.parametrize("hypergradient_lr", [None, 0.5])  # the optimizer's lr; another one
@pytest.mark.parametrize("steps", STEPS_TAKEN)
@pytest.mark.parametrize("name", RULES)
def test_kappa_is_minus_the_jacobian(name, steps, hypergradient_lr, device):
    """By autograd through theta'."""
    optimizer, parameters = make(name, steps, device)
    gradients = gradients_like(parameters, 9)
    v = gradients_like(parameters, 10)
    scaled = mts_fast.virtual_update(optimizer, gradients).scale(v, hypergradient_lr)
    factor = 1.0 if hypergradient_lr is None else hypergradient_lr / optimizer.defaults["lr"]
    states = optimizer_states(optimizer)
    for parameter, g, along, kappa_v in zip(parameters, gradients, v, scaled, strict=True):
        step = smooth(name, states[parameter])
        theta, x = parameter.detach(), g.clone().requires_grad_()
        (product,) = torch.autograd.grad(step(theta, x), x, along)
        # terms of the size of lr v / |g| cancel in autograd; observed 3e-15 of that
        size = factor * optimizer.defaults["lr"] * (along.abs().max() / g.abs().min().clamp(max=1))
        assert ((kappa_v + factor * product).abs() <= 1e-13 * size).all()
    assert scaled.masked_entries == 0


@pytest.mark.parametrize("name", [n for n in RULES if not n.startswith(("lion", "muon"))])
def test_kappa_is_the_slope_of_torchs_own_step(name, device):
    """By central differences of torch's steps, which use nothing of this library."""
    optimizer, parameters = make(name, 7, device)
    gradients, v = gradients_like(parameters, 9), gradients_like(parameters, 10)
    scaled = mts_fast.virtual_update(optimizer, gradients).scale(v)
    h = 1e-6
    moved = [
        real_step(optimizer, parameters, [g + s * h for g in gradients]) for s in (1, -1)
    ]  # each rule here is elementwise
    for kappa_v, up, down, along in zip(scaled, *moved, v, strict=True):
        expected = -(up - down) / (2 * h) * along
        # rounding of 1e-16 / h, for parameters of about 1; observed 5e-11
        assert ((kappa_v - expected).abs() <= 4e-10 * (1 + along.abs())).all()


@pytest.mark.parametrize("name", ["rmsprop_all", "nadam_decay", "radam_decay", "adam_amsgrad"])
def test_cotangent_of_the_weights_by_real_steps(name, device):
    """Rows 3 to 7 against the validation loss after real steps with other weights."""
    cls, options = RULES[name]
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).to(
        device, torch.float64
    )
    parameters = list(model.parameters())
    optimizer = cls(parameters, **options)
    for seed in range(7):
        step_with(optimizer, gradients_like(parameters, seed))
    draw = lambda *shape: torch.randn(shape, dtype=torch.float64).to(device)  # noqa: E731
    x, val_x, z = draw(9, 4), draw(6, 4), draw(9)
    y, val_y = torch.arange(9, device=device) % 3, torch.arange(6, device=device) % 3
    cross_entropy = torch.nn.functional.cross_entropy

    def val_loss_after(z):
        copied_model, copied_optimizer = copy.deepcopy((model, optimizer))
        w = z.sigmoid()
        copied_optimizer.zero_grad()
        (w / w.sum() @ cross_entropy(copied_model(x), y, reduction="none")).backward()
        copied_optimizer.step()
        return cross_entropy(copied_model(val_x), val_y).detach()

    h = 1e-5
    truth = torch.stack(
        [val_loss_after(z + h * e) - val_loss_after(z - h * e) for e in torch.eye(9).to(z)]
    ) / (2 * h)
    p = mts_fast.normalize_weights(z)
    losses = cross_entropy(model(x), y, reduction="none")
    g = torch.autograd.grad(p @ losses, parameters, retain_graph=True)
    update = mts_fast.virtual_update(optimizer, g)
    names = [n for n, _ in model.named_parameters()]
    theta = dict(zip(names, [t.requires_grad_() for t in update.parameters], strict=True))
    val_loss = cross_entropy(torch.func.functional_call(model, theta, (val_x,)), val_y)
    v = torch.autograd.grad(val_loss, update.parameters)
    dots = reference.hypergradient_dots(losses, parameters, update.scale(v))
    assert (
        relative(mts_fast.selector_gradient(dots, z, p), truth) < 5e-6
    )  # observed 1e-6, the rounding of the differences


@pytest.mark.parametrize("name", ["rmsprop_all", "nadam", "radam", "adam_amsgrad", "lion", "muon"])
def test_groups_tensor_lr_and_flags(name, device):
    """Groups with different options; lr as a tensor; foreach where the class has it."""
    cls, options = RULES[name]
    parameters = make(name, 0, device)[1]
    if "foreach" in cls([parameters[0]]).defaults:
        options = options | {"foreach": True}
    lr = torch.tensor([0.3], dtype=torch.float64)
    groups = [
        {"params": parameters[:1], "lr": lr, "weight_decay": 0.2},
        {"params": parameters[1:]},
    ]
    if "foreach" in options:  # torch takes a tensor lr with foreach only on a GPU
        groups[0]["foreach"] = False
    optimizer = cls(groups, **options)
    for seed in range(7):
        step_with(optimizer, gradients_like(parameters, seed))
    gradients, v = gradients_like(parameters, 9), gradients_like(parameters, 10)
    update = mts_fast.virtual_update(optimizer, gradients, along=v)
    for ours, real in zip(
        update.parameters, real_step(optimizer, parameters, gradients), strict=True
    ):
        assert relative(ours, real) < 1e-12  # observed 1e-15
    optimizer.param_groups[0]["lr"] = 0.3
    assert_bitwise(mts_fast.virtual_update(optimizer, gradients).scale(v), update.direction)


@pytest.mark.parametrize("name", ["adam_amsgrad", "adamw_amsgrad"])
def test_amsgrad_is_tried_with_old_and_new_maxima(name, device):
    """The tests above run both branches of the maximum."""
    optimizer, parameters = make(name, 7, device)
    step_with(optimizer, gradients_like(parameters, 9))
    states = [optimizer.state[p] for p in parameters]
    is_new = torch.cat([(s["max_exp_avg_sq"] == s["exp_avg_sq"]).flatten() for s in states])
    assert is_new.any() and not is_new.all()


@pytest.mark.parametrize("name", ["rmsprop", "nadam", "adam_amsgrad"])
def test_float32_kappa_of_the_first_step(name, device):
    """Only a term of eps is left of it: its two terms subtracted in float32 would leave noise."""
    optimizer, parameters = make(name, 0, device)
    single = [torch.nn.Parameter(p.detach().float()) for p in parameters]
    cls, options = RULES[name]
    gradients = gradients_like(single, 9)
    v = [torch.ones_like(p) for p in single]
    scaled = mts_fast.virtual_update(cls(single, **options), gradients).scale(v)
    double_gradients = [g.double() for g in gradients]
    exact = mts_fast.virtual_update(optimizer, double_gradients).scale([t.double() for t in v])
    for mine, truth in zip(scaled, exact, strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=6e-7, atol=0)  # observed 2e-7


def test_radam_with_steps_on_the_device(device):
    """A step count on the device, as with capturable, takes the same branch as one on the host."""
    for steps in STEPS_TAKEN:
        optimizer, parameters = make("radam_decay", steps, device)
        gradients, v = gradients_like(parameters, 9), gradients_like(parameters, 10)
        for p, g, along in zip(parameters, gradients, v, strict=True):
            plain = optimizer_states(optimizer)[p]
            on_device = copy.copy(plain)
            object.__setattr__(on_device, "step", torch.tensor(plain.step, device=device))
            for run in (
                lambda s, p=p, g=g: reference.virtual_update(p.detach(), g, s),
                lambda s, p=p, g=g, v=along: reference.hypergradient_direction(p.detach(), g, s, v),
            ):
                assert relative(run(on_device), run(plain)) < 1e-14  # observed 2e-16


def test_muon_in_bfloat16_and_float32(device):
    """theta' to one ulp: an ulp of the momentum would change a rounding of the iteration."""
    for dtype in (torch.float32, torch.bfloat16):
        parameters = [torch.nn.Parameter(p.detach().to(dtype)) for p in make("muon", 0, device)[1]]
        optimizer = optim.Muon(parameters, lr=0.02)
        for seed in range(3):
            step_with(optimizer, gradients_like(parameters, seed))
        gradients = gradients_like(parameters, 9)
        update = mts_fast.virtual_update(optimizer, gradients, along=gradients)
        # one ulp of the parameter, as torch multiplies in another order
        for ours, real in zip(
            update.parameters, real_step(optimizer, parameters, gradients), strict=True
        ):
            torch.testing.assert_close(ours, real, rtol=torch.finfo(dtype).eps, atol=1e-9)
        assert all(d.dtype == dtype and d.isfinite().all() for d in update.direction)


def test_lion_without_softness_is_refused_by_name(device):
    parameter = torch.nn.Parameter(torch.ones(2, device=device))
    message = r"optimizer must be .* got the derivative of Lion's sign is 0 .*softness=1\.0"
    with pytest.raises(ValueError, match=message):
        mts_fast.virtual_update(Lion([parameter]), [torch.ones(2, device=device)])
    state = mts_fast.LionRule().read(Lion([parameter]).param_groups[0], {})
    g = torch.tensor([2.0, -1.0], device=device)
    theta = reference.virtual_update(parameter.detach(), g, state)
    torch.testing.assert_close(theta, torch.tensor([0.99, 1.01], device=device))
    assert not reference.hypergradient_direction(parameter.detach(), g, state, g).any()
    with pytest.raises(ValueError, match="LionRule: softness must be a finite number above 0"):
        mts_fast.LionRule(softness=0.0)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("steps", [0, 2])
def test_states_read_at_once_are_those_read_one_by_one(name, steps, device):
    """Also where the parameters of a group have taken different numbers of steps."""
    like = lambda parameters, seed: [torch.ones_like(p) for p in parameters]  # noqa: E731
    optimizer, (_, second) = stepped(RULES[name], [(3, 4), (4, 3)], steps, like, device)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2, 2, device=device))]})
    optimizer.param_groups[1]["lr"] = 0.5
    if steps:
        del optimizer.state[second]
    rule = update_rules.rule_of("test", "optimizer", optimizer)
    for group in optimizer.param_groups:
        live = [optimizer.state.get(p, {}) for p in group["params"]]
        together = rule.read_all(group, LiveStates(live))
        for state, expected in zip(together, (rule.read(group, s) for s in live), strict=True):
            assert type(state) is type(expected)
            assert contents(state) == contents(expected)


def contents(state):
    """The fields of a state, tensors by identity."""
    fields = {name: value for name, value in vars(state).items() if name != "base"}
    return {n: id(v) if torch.is_tensor(v) else v for n, v in fields.items()}
