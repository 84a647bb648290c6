"""Update rules that a user registers: their values, a whole step, and which are refused."""

import pytest
import torch
from real_optimizers import ones

import mts_fast
from mts_fast.ops import update_rules

optim = torch.optim
SGD, AdamW = optim.SGD, optim.AdamW


@pytest.fixture(autouse=True)
def restored_registry(monkeypatch):
    """Removes what a test registers."""
    monkeypatch.setattr(update_rules, "_rules", dict(update_rules._rules))


class Normalized(optim.Optimizer):
    """theta - lr g / |g|, |g| of the whole tensor: its kappa is not diagonal."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad / p.grad.norm())


class NormalizedRule(mts_fast.UpdateRule):
    def updated(self, parameter, gradient, group, state):
        return parameter - group["lr"] * gradient / gradient.norm()


class ClosedRule(NormalizedRule):
    """The same with its derivative written out, and a root of 0 that masks one entry."""

    def direction(self, parameter, gradient, group, state, along):
        unit = gradient / gradient.norm()
        return group["lr"] * (along - unit * (unit @ along)) / gradient.norm()

    def second_moment_root(self, parameter, gradient, group, state):
        return torch.tensor([1.0, 0.0, 1.0], dtype=gradient.dtype)


def update_of(rule, *, lr=0.5, hypergradient_lr=None):
    """theta' and kappa v of a new optimizer class that this rule serves."""
    cls = type("Served", (Normalized,), {})
    mts_fast.register_update_rule(cls, rule)
    p = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    g = torch.tensor([3.0, 0.0, 4.0], dtype=torch.float64)
    v = torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64)
    update = mts_fast.virtual_update(cls([p], lr=lr), [g])
    return update.parameters[0], update.scale([v], hypergradient_lr)


def test_a_rule_of_ones_own():
    p = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    p.grad = torch.tensor([3.0, 0.0, 4.0], dtype=torch.float64)
    Normalized([p], lr=0.5).step()
    # lr (v - u <u, v>) / |g| with u = (0.6, 0, 0.8), <u, v> = -0.2, |g| = 5
    expected = torch.tensor([1.12, 2.0, -0.84], dtype=torch.float64) / 10
    for factor, hypergradient_lr in ((1, None), (4, 2.0)):
        theta, scaled = update_of(NormalizedRule(), hypergradient_lr=hypergradient_lr)
        assert torch.equal(theta, p.detach())
        torch.testing.assert_close(scaled[0], factor * expected, rtol=1e-14, atol=0)
        assert scaled.masked_entries == 0
        _, closed = update_of(ClosedRule(), hypergradient_lr=hypergradient_lr)
        expected_masked = factor * expected * torch.tensor([1, 0, 1])
        torch.testing.assert_close(closed[0], expected_masked, rtol=1e-14, atol=0)
        assert closed.masked_entries == 1


def test_a_whole_step_with_a_rule_of_ones_own():
    """The dots add up to <kappa v, gradient>, and the real step is the optimizer's."""
    mts_fast.register_update_rule(Normalized, NormalizedRule())
    model = torch.nn.Linear(3, 2).double()
    selector = mts_fast.Selector(0, 2).double()
    selector_optimizer = AdamW(selector.parameters(), lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = Normalized(model.parameters(), lr=0.5)
    step = mts_fast.MTSStep(model, optimizer, selector, selector_optimizer, online_features=False)
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.arange(6) % 2
    result = step(x, y, val_inputs=x[:2], val_labels=y[:2])
    assert result.dots.abs().max() > 0 and result.self_check < 1e-12
    for p, old in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close((p - old).norm(), torch.tensor(0.5).double())


def test_a_class_may_step_like_another():
    class Renamed(AdamW):
        def step(self, closure=None):
            return super().step(closure)

    p, g = ones(3), torch.tensor([1.0, 2.0, 3.0])
    with pytest.raises(TypeError, match="Renamed, which overrides step"):
        mts_fast.virtual_update(Renamed([p]), [g])
    mts_fast.register_update_rule(Renamed, AdamW)
    mine, real = (mts_fast.virtual_update(c([p]), [g], along=[g]) for c in (Renamed, AdamW))
    assert torch.equal(mine.parameters[0], real.parameters[0])
    assert torch.equal(mine.direction[0], real.direction[0])


class Writes(NormalizedRule):
    def updated(self, parameter, gradient, group, state):
        return parameter.sub_(gradient)


class WritesInDirection(NormalizedRule):
    def direction(self, parameter, gradient, group, state, along):
        return along.mul_(2)


class Detached(NormalizedRule):
    def updated(self, parameter, gradient, group, state):
        return parameter - gradient.detach()


class Summed(NormalizedRule):
    def updated(self, parameter, gradient, group, state):
        return (parameter - gradient).sum()


class Nothing(NormalizedRule):
    def updated(self, parameter, gradient, group, state):
        return None


class Unable(NormalizedRule):
    def reasons(self, group, state):
        return ["lr is 0.5"] if group["lr"] == 0.5 else []


# rule, error, message
WRONG_RULES = {
    "writes": (Writes(), RuntimeError, r"Writes\.updated\(\) must be out of place"),
    "direction": (WritesInDirection(), RuntimeError, r"\.direction\(\) must be out of place"),
    "detached": (
        Detached(),
        ValueError,
        r"Detached\.updated\(\) must be differentiable .*override",
    ),
    "shape": (Summed(), ValueError, r"must be a tensor of shape \(3,\), got \(\); correct"),
    "none": (Nothing(), ValueError, r"must be a tensor of shape \(3,\), got NoneType; correct"),
    "reasons": (Unable(), ValueError, "optimizer must be one that .* got lr is 0.5; change"),
}


@pytest.mark.parametrize("case", WRONG_RULES)
def test_wrong_rules_are_named(case):
    rule, error, message = WRONG_RULES[case]
    with pytest.raises(error, match="virtual_update: .*" + message):
        update_of(rule)
    if case == "reasons":
        update_of(rule, lr=0.25)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((SGD([ones(1)], lr=0.1), NormalizedRule()), TypeError, "optimizer_class must be a subcl"),
        ((dict, NormalizedRule()), TypeError, "optimizer_class must be a subclass"),
        ((Normalized, NormalizedRule), TypeError, "rule must be an UpdateRule, got .*; subclass"),
        ((Normalized, None), TypeError, "rule must be an UpdateRule, got NoneType"),
        (
            (Normalized, optim.Adadelta),
            ValueError,
            "rule must be a class that has a rule, got Adadelta; give",
        ),
    ],
)
def test_refused_registrations(arguments, error, message):
    with pytest.raises(error, match="register_update_rule: " + message):
        mts_fast.register_update_rule(*arguments)
