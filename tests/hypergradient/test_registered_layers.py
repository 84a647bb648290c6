"""A layer that a user registers gets what torch's layers get: replay, fused dot, norm parts."""

import pytest
import torch
from comparison import relative
from torch import nn
from torch.nn import functional as F
from torch.overrides import handle_torch_function

from mts_fast import reference, use_backend
from mts_fast.backends.triton.eligibility import triton_reasons
from mts_fast.backends.triton.launch import recorded_launches
from mts_fast.hypergradient import (
    DensePart,
    LabelledBatch,
    Objective,
    OuterPart,
    ScatteredPart,
    register_layer,
)
from mts_fast.hypergradient.ghost import Ghost, Unsupported, sample_parts
from mts_fast.hypergradient.ghost.rules import _rules
from mts_fast.hypergradient.ghost.sample_norms import gradient_norms

# rounding of float64; observed 1e-15
EXACT = 1e-12
SCALE = 3.0


def scaled_linear(x, weight, bias=None):
    """SCALE (x W^T + c), as a kernel of the user's own would compute it."""
    if torch.overrides._len_torch_function_stack():
        return handle_torch_function(scaled_linear, (x, weight), x, weight, bias)
    return SCALE * F.linear(x, weight, bias)


def lookup(index, table):
    """Rows of a table."""
    if torch.overrides._len_torch_function_stack():
        return handle_torch_function(lookup, (index, table), index, table)
    return table[index]


def squared_linear(x, weight):
    """x (W^2)^T: not linear in W, its tangent is x (2 W V)^T."""
    if torch.overrides._len_torch_function_stack():
        return handle_torch_function(squared_linear, (x, weight), x, weight)
    return F.linear(x, weight**2)


def rows(values, axis, size):
    return axis.samples(values.detach(), size).reshape(size, -1, values.shape[-1])


def as_product(call, directions, b, axis, size):
    if "weight" not in directions:
        return None
    bias = directions.get("bias")
    a, v = rows(call.input, axis, size), SCALE * directions["weight"]
    return a, v, rows(b, axis, size), None if bias is None else SCALE * bias


def outer_parts(call, b, axis, size):
    left = SCALE * rows(b, axis, size)
    weight = OuterPart(left, rows(call.input, axis, size))
    return {"weight": weight, "bias": DensePart(left.sum(1))}


def table_parts(call, b, axis, size):
    index = call.input.reshape(size, -1)
    return {"table": ScatteredPart(index, b.reshape(*index.shape, -1), len(call.argument("table")))}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """The layers of these tests, forgotten at the end."""
    for function in (scaled_linear, lookup, squared_linear):
        monkeypatch.setitem(_rules, function, None)
    register_layer(
        scaled_linear,
        {"weight": 1, "bias": 2},
        as_product=as_product,
        sample_parts=outer_parts,
    )
    register_layer(lookup, {"table": 1}, nullable=(), sample_parts=table_parts)
    register_layer(
        squared_linear,
        {"weight": 1},
        tangent=lambda call, v: F.linear(call.input, 2 * call.argument("weight") * v["weight"]),
    )


class Network(nn.Module):
    """Tokens and positions from tables of the user's, two of the user's layers, a plain head."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(9, 6))
        self.positions = nn.Parameter(torch.randn(5, 6))
        self.weight, self.bias = nn.Parameter(torch.randn(7, 6)), nn.Parameter(torch.randn(7))
        self.square, self.head = nn.Parameter(torch.randn(4, 7)), nn.Linear(4, 3)

    def forward(self, x):
        h = lookup(x, self.tokens) + lookup(torch.arange(x.shape[1]), self.positions)
        h = scaled_linear(h, self.weight, self.bias).tanh()
        return self.head(squared_linear(h.mean(1), self.square).tanh())


def make():
    batch = LabelledBatch(torch.randint(9, (6, 5)), torch.arange(6) % 3)
    return Network().double(), batch


def test_dots_and_gradients_are_exact():
    model, batch = make()
    parameters = list(model.parameters())
    direction = [torch.randn_like(p) for p in parameters]
    losses = reference.cross_entropy(model(batch.inputs), batch.labels)
    truth = reference.hypergradient_dots(losses, parameters, direction)
    weights = torch.rand(6).double()
    gradients = torch.autograd.grad((weights * losses).sum(), parameters)
    linearization = Ghost(Objective(model), parameters).linearize(batch)
    assert relative(linearization.dots(direction), truth) < EXACT
    for mine, true in zip(linearization.gradient(weights), gradients, strict=True):
        assert relative(mine, true) < EXACT


def test_the_product_is_fused_with_the_dot():
    if triton_reasons():
        pytest.skip("; ".join(triton_reasons()))
    model, batch = make()
    parameters = list(model.parameters())
    direction = [torch.randn_like(p) for p in parameters]
    engine = Ghost(Objective(model), parameters)
    expected = engine.dots(batch, direction)
    with use_backend("triton"):
        assert relative(engine.dots(batch, direction), expected) < EXACT
        linearization = engine.linearize(batch, gradients=1)
        linearization.gradient(torch.ones(6).double())
        with recorded_launches() as launches:
            linearization.dots(direction)
    names = [launch.kernel.__name__ for launch in launches]
    # the user's layer and the head
    assert names.count("hypergradient_dot_kernel") == 2


def test_norms_take_the_parts(monkeypatch):
    """No sample is run by itself, but in the layer that has no parts."""
    model, batch = make()
    by_one = []
    one_by_one = sample_parts._one_by_one
    monkeypatch.setattr(
        sample_parts,
        "_one_by_one",
        lambda call, *rest: by_one.append(call.rule.function) or one_by_one(call, *rest),
    )
    norms = norms_by_ghost(model, batch)
    assert by_one == [squared_linear]
    assert relative(norms, true_norms(model, batch)) < EXACT


def norms_by_ghost(model, batch):
    return gradient_norms(Ghost(Objective(model), list(model.parameters())), batch)


def true_norms(model, batch):
    norms = []
    for x, y in zip(batch.inputs, batch.labels, strict=True):
        loss = F.cross_entropy(model(x[None]), y[None])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        norms.append(torch.cat([g.flatten() for g in gradients]).norm())
    return torch.stack(norms)


def test_a_reason_for_no_parts_is_named():
    register_layer(
        scaled_linear, {"weight": 1, "bias": 2}, sample_parts=lambda *_: "it has no parts"
    )
    model, batch = make()
    with pytest.raises(Unsupported, match="weight: it has no parts"):
        norms_by_ghost(model, batch)


def squares_only_in(mode):
    return lambda call: "not linear" if call.option("mode", 2, "plain") == mode else None


def moded_lookup(index, table, mode="plain"):
    """Rows of a table, or of its square."""
    if torch.overrides._len_torch_function_stack():
        return handle_torch_function(moded_lookup, (index, table), index, table, mode)
    return table[index] if mode == "plain" else (table**2)[index]


class Places(nn.Module):
    """A table of positions, which all samples share."""

    def __init__(self, mode):
        super().__init__()
        self.table, self.head, self.mode = nn.Parameter(torch.randn(5, 6)), nn.Linear(6, 3), mode

    def forward(self, x):
        return self.head((x + moded_lookup(torch.arange(5), self.table, self.mode)).mean(1).tanh())


def test_rows_for_all_samples_are_derived_where_the_layer_would_refuse(monkeypatch):
    monkeypatch.setitem(_rules, moded_lookup, None)
    register_layer(moded_lookup, {"table": 1}, nullable=(), refuses=squares_only_in("square"))
    batch = LabelledBatch(torch.randn(6, 5, 6).double(), torch.arange(6) % 3)
    for mode in ("plain", "square"):
        model = Places(mode).double()
        parameters = list(model.parameters())
        direction = [torch.randn_like(p) for p in parameters]
        losses = reference.cross_entropy(model(batch.inputs), batch.labels)
        truth = reference.hypergradient_dots(losses, parameters, direction)
        assert relative(Ghost(Objective(model), parameters).dots(batch, direction), truth) < EXACT


class Sum(nn.Module):
    """addmm with factors, which scale the gradients, or a bias that is broadcast."""

    def __init__(self, width, **factors):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(width))
        self.factors = factors

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight, **self.factors)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(("width", "factors"), [(3, {}), (3, {"beta": 0.5, "alpha": 3.0}), (1, {})])
def test_addmm_with_factors_and_with_a_broadcast_bias(width, factors, backend):
    if backend == "triton" and triton_reasons():
        pytest.skip("; ".join(triton_reasons()))
    model = Sum(width, **factors).double()
    batch = LabelledBatch(torch.randn(6, 5).double(), torch.arange(6) % 3)
    parameters = list(model.parameters())
    direction = [torch.randn_like(p) for p in parameters]
    truth = reference.hypergradient_dots(
        reference.cross_entropy(model(batch.inputs), batch.labels), parameters, direction
    )
    with use_backend(backend):
        assert relative(Ghost(Objective(model), parameters).dots(batch, direction), truth) < EXACT
        assert relative(norms_by_ghost(model, batch), true_norms(model, batch)) < EXACT
