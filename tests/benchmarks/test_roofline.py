"""Bytes and operations of operators, against counts by hand; the roof; the table of whole steps."""

import inspect
import itertools

import pytest
import torch
import torch.nn.functional as F
from roofline import LAUNCHED, Operator, StepCost, roofline_report, step_cost
from torch import nn

import mts_fast
from mts_fast import ops, use_backend
from mts_fast.backends import registry
from mts_fast.backends.triton.eligibility import triton_reasons
from mts_fast.ops.perturb import global_norm, perturb

FLOAT, HALF, INDEX = 4, 2, 8  # bytes of float32, bfloat16 and int64
needs_triton = pytest.mark.skipif(bool(triton_reasons()), reason="; ".join(triton_reasons()))


def cost_by_name(call):
    """name -> (bytes, flops) of every operator of the call, which has each name once."""
    operators = step_cost(call).operators
    named = {o.name: (o.bytes, o.flops) for o in operators}
    assert len(named) == len(operators), operators
    return named


def moved(call):
    """Bytes of the call's only operator."""
    (operator,) = step_cost(call).operators
    return operator.bytes


@pytest.mark.parametrize("context", [torch.enable_grad, torch.inference_mode])
def test_linear(device, context):
    x, w, b = (torch.randn(*shape, device=device) for shape in ((6, 5), (3, 5), (3,)))
    with context():
        named = cost_by_name(lambda: F.linear(x, w, b))
    assert named == {"addmm": (FLOAT * (6 * 5 + 3 * 5 + 3 + 6 * 3), 2 * 6 * 5 * 3)}


def test_views_and_allocations_move_nothing(device):
    x = torch.randn(6, 4, device=device)

    def call():
        x.t().expand(3, 4, 6).reshape(3, 24)[:, ::2].detach().split(1)
        torch.empty_like(x).new_empty(7)
        x.data, x.view(24)

    # reshape of an expanded tensor is a copy
    assert cost_by_name(call) == {"clone": (FLOAT * (24 + 72), 0)}


@pytest.mark.parametrize(
    ("call", "tensors"),
    [
        (lambda x, y: x + y, 3),
        (lambda x, y: x.add_(y), 3),
        (lambda x, y: x.mul_(2.0), 2),
        (lambda x, y: x.copy_(y), 2),
        (lambda x, y: x.zero_(), 1),
        (lambda x, y: torch.add(x, x, out=y), 2),
        (lambda x, y: torch.zeros_like(x), 1),
        (lambda x, y: x * x, 2),
        (lambda x, y: torch.addcmul(x, x, y), 3),
        (lambda x, y: x.clone(), 2),
        (lambda x, y: torch.cat([x, y]), 4),
        (lambda x, y: torch.stack([x[:, :0], y[:, :0]]), 0),
        (lambda x, y: torch._foreach_add_([x, y], [y, x]), 4),  # reads and writes both
        (lambda x, y: torch._foreach_mul([x, y], 2.0), 4),
        (lambda x, y: torch._foreach_zero_([x, y]), 2),
        (lambda x, y: torch._foreach_copy_([x], [y]), 2),
    ],
)
def test_elementwise(device, call, tensors):
    x, y = torch.randn(6, 4, device=device), torch.randn(6, 4, device=device)
    cost = step_cost(lambda: call(x, y))
    assert cost.bytes == tensors * 24 * FLOAT
    assert cost.flops == 0


def test_shared_and_expanded_memory_counts_once(device):
    x, row = torch.randn(6, 4, device=device), torch.randn(4, device=device)
    assert moved(lambda: x + row.expand(6, 4)) == FLOAT * (24 + 4 + 24)
    assert moved(lambda: x @ x.t()) == FLOAT * (24 + 36)
    halves = torch.randn(6, 8, device=device)
    assert moved(lambda: halves[:, :4] * halves[:, 4:]) == FLOAT * (48 + 24)
    assert moved(lambda: halves[:, :4] * 2) == FLOAT * (24 + 24)
    # windows of 3 over 8 entries overlap
    windows = halves.flatten()[:8].unfold(0, 3, 1)
    assert moved(lambda: windows.exp()) == FLOAT * (8 + 18)
    # q, k and v interleaved in one memory
    q, k, v = torch.randn(2, 5, 3, 4, device=device).unbind(2)
    assert moved(lambda: torch.addcmul(q, k, v)) == FLOAT * (2 * 5 * 3 * 4 + 2 * 5 * 4)


def test_rows_that_an_index_names(device):
    table = torch.randn(100, 4, device=device)
    rows = torch.tensor([7, 3, 3], device=device)
    assert moved(lambda: F.embedding(rows, table)) == FLOAT * 2 * 12 + INDEX * 3
    assert moved(lambda: table[rows]) == FLOAT * 2 * 12 + INDEX * 3
    weight = table.clone().requires_grad_()
    y = F.embedding(rows, weight, sparse=True)
    cost = step_cost(lambda: y.backward(torch.ones_like(y)))
    assert cost.operators[0] == Operator("ones_like", FLOAT * 12)
    assert cost.bytes < FLOAT * 100  # far less than the table's 400 entries
    values = torch.randn(3, 4, device=device)
    assert moved(lambda: table.index_add_(0, rows, values)) == FLOAT * 3 * 12 + INDEX * 3
    assert moved(lambda: table.index_copy_(0, rows, values)) == FLOAT * 2 * 12 + INDEX * 3
    logits = torch.randn(3, 100, device=device, requires_grad=True)
    losses = F.nll_loss(logits, rows, reduction="none")
    assert moved(lambda: F.nll_loss(logits, rows, reduction="none")) == pytest.approx(
        FLOAT * (3 + 3) + INDEX * 3,
        abs=2 * FLOAT,  # and the total weight
    )
    named = cost_by_name(lambda: losses.backward(torch.ones(3, device=device)))
    # the gradient is written in full, and the logits are not read
    assert named["nll_loss_backward"][0] <= FLOAT * (300 + 3 + 1) + INDEX * 3


@pytest.mark.parametrize("groups", [1, 2])
def test_convolution(device, groups):
    x = torch.randn(2, 4, 9, 9, device=device, requires_grad=True)
    w = torch.randn(6, 4 // groups, 3, 3, device=device, requires_grad=True)
    product = 2 * 2 * 6 * 4 // groups * 9 * 49  # N, Cout, Cin of a group, 3 x 3, 7 x 7 outputs
    x_size, w_size, y_size = 2 * 4 * 81, w.numel(), 2 * 6 * 49
    forward = cost_by_name(lambda: F.conv2d(x, w, groups=groups))
    assert forward == {"convolution": (FLOAT * (x_size + w_size + y_size), product)}
    y = F.conv2d(x, w, groups=groups)
    b = torch.randn_like(y)
    for inputs, needed, products in (
        ([x, w], 2 * (x_size + w_size) + y_size, 2),
        ([x], w_size + x_size + y_size, 1),
        ([w], x_size + w_size + y_size, 1),
    ):
        named = cost_by_name(lambda i=inputs: torch.autograd.grad(y, i, b, retain_graph=True))
        assert named == {"convolution_backward": (FLOAT * needed, products * product)}


@pytest.mark.parametrize("causal", [False, True])
def test_attention_on_a_cpu(causal):
    q, k, v = (torch.randn(2, 3, 16, 8, requires_grad=True) for _ in range(3))
    size, pairs = 2 * 3 * 16 * 8, 2 * 3 * 16 * 16 // (2 if causal else 1)
    named = cost_by_name(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal))
    lse = 2 * 3 * 16
    forward = (FLOAT * (4 * size + lse), 2 * 2 * 8 * pairs)
    assert named == {"_scaled_dot_product_flash_attention_for_cpu": forward}
    y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    b = torch.randn_like(y)
    named = cost_by_name(lambda: torch.autograd.grad(y, [q, k, v], b))
    backward = named["_scaled_dot_product_flash_attention_for_cpu_backward"]
    # the scores again, and the four products of their gradients
    assert backward == (FLOAT * (8 * size + lse), 5 * 2 * 8 * pairs)


def test_a_product_counts_in_the_dtype_it_runs_in(device):
    x, w = torch.randn(6, 5, device=device), torch.randn(3, 5, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        cost = step_cost(lambda: F.linear(x, w))
    assert cost.dtypes == {torch.bfloat16}
    product = HALF * (6 * 5 + 3 * 5 + 6 * 3)
    casts = (FLOAT + HALF) * (6 * 5 + 3 * 5)
    assert (cost.bytes, cost.flops) == (product + casts, 2 * 6 * 5 * 3)


def test_a_plain_step(device):
    """All of a step of SGD, operator by operator: a multi-layer perceptron, its output summed."""
    batch, widths = 8, (5, 7, 3)
    layers = [nn.Linear(n, m, bias=False) for n, m in itertools.pairwise(widths)]
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1]).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=True)
    x = torch.randn(batch, widths[0], device=device)

    def step():
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()

    step()
    cost = step_cost(step)
    x0, h, y = (batch * width for width in widths)
    first, second = (layer.weight.numel() for layer in layers)
    products = (x0 + first + h) + (h + second + y)  # of the forward
    # gradients of the second weight, and of h; that of the output is one entry, expanded
    products += (h + 1 + second) + (1 + second + h)
    products += x0 + h + first  # of the first weight
    relu = 2 * h + 3 * h  # forward, and threshold_backward of the gradient and the output
    total = (y + 1) + 1  # the sum, and ones_like for its gradient
    # momentum is scaled in place, the gradient added; then the parameter moves
    update = (2 + 3 + 3) * (first + second)
    assert cost.bytes == FLOAT * (products + relu + total + update)
    assert cost.flops == 2 * batch * (2 * first + 3 * second)


def test_fused_optimizers_do_not_write_gradients(device):
    p = nn.Parameter(torch.randn(6, 4, device=device))
    p.grad = torch.randn_like(p)
    optimizer = torch.optim.AdamW([p], lr=0.1, fused=True)
    optimizer.step()
    (operator,) = (o for o in step_cost(optimizer.step).operators if "fused" in o.name)
    # parameter and two moments read and written, the gradient read; the count of steps is read
    assert operator.bytes == FLOAT * (7 * 24 + 1)


@needs_triton
def test_products_of_our_kernels(device):
    a, v, b, bias = (
        torch.randn(*shape, device=device) for shape in ((2, 6, 5), (3, 5), (2, 6, 3), (3,))
    )
    with use_backend("triton"):
        named = cost_by_name(lambda: ops.hypergradient_dot(a, v, b, bias))
        dots = cost_by_name(lambda: ops.sample_dot(a, a.clone()))
    read = 2 * 6 * 5 + 3 * 5 + 2 * 6 * 3 + 3
    assert named == {"hypergradient_dot": (FLOAT * (read + 2), 2 * 12 * 5 * 3)}
    assert dots["sample_dot"] == (FLOAT * (2 * 60 + 2), 0)


@needs_triton
def test_linear_cross_entropy(device):
    hidden = torch.randn(6, 5, device=device, requires_grad=True)
    weight = torch.randn(9, 5, device=device, requires_grad=True)
    labels = torch.arange(6, device=device)
    product = 2 * 6 * 5 * 9
    with use_backend("triton"):
        forward = step_cost(lambda: mts_fast.linear_cross_entropy(hidden, weight, labels))
        losses = mts_fast.linear_cross_entropy(hidden, weight, labels)
        both = step_cost(lambda: losses.sum().backward())
        losses = mts_fast.linear_cross_entropy(hidden, weight.detach(), labels)
        one = step_cost(lambda: losses.sum().backward())
    assert forward.flops == product
    (kernel,) = (o for o in forward.operators if o.flops)
    # losses, and the maximum and the total of every row
    assert kernel.bytes == FLOAT * (6 * 5 + 9 * 5 + 3 * 6) + INDEX * 6
    # the logits are made anew
    assert (both.flops, one.flops) == (3 * product, 2 * product)


@needs_triton
@pytest.mark.parametrize(
    ("kind", "options", "updated", "direction"),
    [
        (torch.optim.SGD, {"momentum": 0.9}, 4, 2),  # theta, g, momentum -> theta'; v -> kappa v
        (torch.optim.AdamW, {}, 5, 5),  # theta, g, two moments -> theta'; v, g, moments -> kappa v
    ],
)
def test_kernels_outside_of_the_dispatcher(device, kind, options, updated, direction):
    leaves = [nn.Parameter(torch.randn(16, 8, device=device)) for _ in range(2)]
    optimizer = kind(leaves, lr=0.1, **options)
    gradients = [torch.randn_like(p) for p in leaves]
    for p, g in zip(leaves, gradients, strict=True):
        p.grad = g.clone()
    optimizer.step()
    tensor = 2 * 16 * 8 * FLOAT
    small = 64  # counts of steps and of masked entries
    with use_backend("triton"), torch.no_grad():
        cost = step_cost(lambda: mts_fast.virtual_update(optimizer, gradients))
        along = step_cost(lambda: mts_fast.virtual_update(optimizer, gradients, along=gradients))
        values, scale = [p.detach() for p in leaves], torch.ones((), device=device)
        moved_by = step_cost(lambda: perturb(values, gradients, scale))
        norm = step_cost(lambda: global_norm(gradients))
    by_name = {o.name: o.bytes for o in cost.operators}
    assert updated * tensor <= by_name["virtual_update"] <= updated * tensor + small
    by_name = {o.name: o.bytes for o in along.operators}
    # gradients are also the direction here: their memory counts once
    fused = by_name["virtual_update_along"]
    assert (updated + 1) * tensor <= fused <= (updated + 1) * tensor + small
    assert [o.bytes for o in moved_by.operators] == [3 * tensor + FLOAT]
    assert [o.bytes for o in norm.operators] == [tensor + FLOAT]


def test_every_kernel_is_counted():
    """A Triton kernel is an operator of torch, or one of those that are counted as they launch."""
    for op, kernels in registry._implementations.items():
        if "triton" in kernels:
            module = inspect.getmodule(kernels["triton"].function)
            dispatched = "torch.library.define" in inspect.getsource(module)
            assert dispatched != (op in LAUNCHED), op


def test_an_error_leaves_the_kernels_as_they_were():
    before = {op: dict(kernels) for op, kernels in registry._implementations.items()}
    with pytest.raises(ZeroDivisionError):
        step_cost(lambda: 1 / 0)
    assert registry._implementations == before


def test_roof():
    """Each operator at its lower ceiling: 2 s of bytes, 3 s of products, 1 s of either."""
    cost = StepCost(
        (
            Operator("add", 20),
            Operator("mm", 10, 300, torch.float32),
            Operator("bmm", 10, 50, torch.bfloat16),
        )
    )
    rates = {torch.float32: 100.0, torch.bfloat16: 50.0}
    roof = cost.roof(10.0, rates)
    assert (roof.seconds, roof.memory_seconds) == (6.0, 3.0)
    report = roofline_report(cost, 12.0, 10.0, rates)
    assert report["% of roof"] == 50.0
    assert report["% of roof by bytes"] == 50.0
    assert report["GB/s"] == pytest.approx(40 / 12 / 1e9, rel=1e-3)
    assert report["TFLOP/s"] == pytest.approx(350 / 12 / 1e12, rel=1e-3)
    assert report["product TFLOP/s"] == {"bfloat16": 5e-11, "float32": 1e-10}
