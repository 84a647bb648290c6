"""virtual_update and hypergradient_dot: the kernels against the reference, and their own routes."""

import pytest
import torch
from comparison import assert_bitwise, snapshot

import mts_fast
from mts_fast import reference, use_backend
from mts_fast._extension import extension
from mts_fast.hypergradient.ghost.sample_axis import SampleAxis
from mts_fast.ops import hypergradient_dot, virtual_update, virtual_update_cpp

needs_cpp = pytest.mark.skipif(not extension().available, reason=extension().reason)
# a scalar, odd sizes, none, more than one task of 32768, a matrix
SHAPES = ((), (1,), (7,), (0,), (3, 5), (70_001,), (33, 64))
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd decay": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.01, maximize=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "dampening": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.3),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "adam maximize": lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.5, 0.9), maximize=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}


def make(name, dtype, steps, shapes=SHAPES):
    g = torch.Generator().manual_seed(0)

    def draw():
        return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]

    parameters = [torch.nn.Parameter(t) for t in draw()]
    optimizer = OPTIMIZERS[name](parameters)
    for _ in range(steps):
        for p, gradient in zip(parameters, draw(), strict=True):
            p.grad = gradient
        optimizer.step()
    return optimizer, draw()


@needs_cpp
@pytest.mark.parametrize("steps", [0, 2])  # before any state, with state
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_equals_reference(name, dtype, steps):
    optimizer, gradients = make(name, dtype, steps)
    before = snapshot(optimizer=optimizer)
    with use_backend("reference"):
        expected = virtual_update(optimizer, gradients).parameters
    with use_backend("cpp"):
        found = virtual_update(optimizer, gradients).parameters
    if "adam" not in name:
        assert_bitwise(found, expected)
    for mine, truth in zip(found, expected, strict=True):
        # the last place of the parameter or of a step of 0.01; observed 0.9 of the first
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(mine, truth, rtol=eps, atol=eps)
    assert_bitwise(snapshot(optimizer=optimizer), before)


@needs_cpp
def test_groups_and_missing_gradients():
    """Every group with its own numbers; a parameter without a gradient stays, as a copy."""
    g = torch.Generator().manual_seed(0)
    p = [torch.nn.Parameter(torch.randn(5, generator=g)) for _ in range(4)]
    groups = [{"params": p[:2]}, {"params": p[2:], "lr": 0.5, "momentum": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    gradients = [torch.randn(5, generator=g) if i != 2 else None for i in range(4)]
    for backend in ("reference", "cpp"):
        with use_backend(backend):
            found = virtual_update(optimizer, gradients).parameters
        lrs = [0.1, 0.1, 0.0, 0.5]
        for i in range(4):
            step = 0 if gradients[i] is None else lrs[i] * gradients[i]
            torch.testing.assert_close(found[i], p[i].detach() - step)
        assert found[2].data_ptr() != p[2].data_ptr()


@needs_cpp
@pytest.mark.parametrize("gradient_format", ["same", "other"])
def test_memory_formats(gradient_format, monkeypatch):
    """channels_last weights go through the kernel where their gradients lie alike, else through the
    reference; the result keeps the weight's layout."""
    weight = torch.nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last))
    gradient = torch.randn(4, 3, 2, 2)
    if gradient_format == "same":
        gradient = gradient.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    taken = []
    whole = virtual_update_cpp._call
    monkeypatch.setattr(
        virtual_update_cpp, "_call", lambda *a: taken.append(len(a[0])) or whole(*a)
    )
    with use_backend("cpp"):
        (found,) = virtual_update(optimizer, [gradient]).parameters
    assert torch.equal(found, weight.detach() - 0.1 * gradient)
    assert taken == ([1] if gradient_format == "same" else [])
    assert gradient_format == "other" or found.stride() == weight.stride()


@needs_cpp
def test_schema_of_the_updates():
    optimizer, gradients = make("nesterov", torch.float64, 1, shapes=((3, 2), (5,)))
    parameters = [p.detach() for p in optimizer.param_groups[0]["params"]]
    torch.library.opcheck(
        torch.ops.mts_fast.virtual_update_sgd.default,
        (parameters, gradients, gradients, 0.1, 0.9, 0.0, 0.0, True, False),
    )
    torch.library.opcheck(
        torch.ops.mts_fast.virtual_update_adam.default,
        (parameters, gradients, [], [], 0.1, 0.9, 0.99, 1e-8, 0.0, 0.0, True, False),
    )


@needs_cpp
def test_half_precision_parameters_are_named():
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([weight, torch.nn.Parameter(torch.ones(3))], lr=0.1)
    gradients = [torch.ones(3, dtype=torch.bfloat16), torch.ones(3)]
    virtual_update(optimizer, gradients)  # auto: the reference
    with (
        use_backend("cpp"),
        pytest.raises(RuntimeError, match=r"float32 or float64, not torch\.bfloat16"),
    ):
        virtual_update(optimizer, gradients)


# one product; around the 64 sums and the blocks of 2048; more than one task
@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 2047, 2048, 2049, 70_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dots(length, dtype, backend):
    g = torch.Generator().manual_seed(length)
    x, y = (torch.randn(5, length, generator=g, dtype=torch.float64).to(dtype) for _ in range(2))
    truth = (x.double() * y.double()).sum(1)
    found = hypergradient_dot(x, y)
    # relative to the sum of the magnitudes; torch's own error is 0.3 to 0.5 of this
    scale = (x.double() * y.double()).abs().sum(1)
    assert ((found.double() - truth).abs() <= torch.finfo(dtype).eps * scale).all()
    assert found.dtype == dtype


@needs_cpp
def test_dots_of_views_and_threads():
    x, y = torch.randn(7, 3000), torch.randn(7, 3000)
    before = torch.get_num_threads()
    with use_backend("cpp"):
        expected = hypergradient_dot(x, y)
        assert_bitwise(
            hypergradient_dot(x.T.contiguous().T, torch.stack([y, y], 2)[..., 0]), expected
        )
        try:
            for count in (1, 3):
                torch.set_num_threads(count)
                assert_bitwise(hypergradient_dot(x, y), expected)
        finally:
            torch.set_num_threads(before)
    torch.library.opcheck(torch.ops.mts_fast.hypergradient_dot.default, (x, y))


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("axis", [SampleAxis(), SampleAxis(1), SampleAxis(0, interleaved=True)])
def test_dots_of_a_layer(axis, overwrite, backend):
    """Any sample axis; the kernel never writes, and nothing does where that is not allowed."""
    x, y = torch.randn(6, 12, 5), torch.randn(6, 12, 5)
    expected = (axis.samples(x, 3) * axis.samples(y, 3)).flatten(1).sum(1)
    kept = x.clone(), y.clone()
    found = axis.dot(x, y, 3, overwrite=overwrite)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(y, kept[1])
    rows = axis == SampleAxis()
    if not overwrite or (rows and backend == "cpp"):
        assert torch.equal(x, kept[0])
    broadcast = axis.dot(torch.ones(1, 12, 5), y, 3, overwrite=False)
    truth = axis.samples(y, 3).flatten(1).sum(1)
    torch.testing.assert_close(broadcast, truth, rtol=1e-5, atol=1e-5)


def test_refusals():
    x = torch.ones(2, 3)
    with pytest.raises(TypeError, match="hypergradient_dot: x must be a floating-point tensor"):
        hypergradient_dot(x.long(), x)
    with pytest.raises(ValueError, match=r"y must be torch\.float32 of x's shape \(2, 3\), got"):
        hypergradient_dot(x, x.double())
    with pytest.raises(ValueError, match=r"y must be .* \(2, 3\), got .* \(3,\)"):
        hypergradient_dot(x, x[0])
    assert torch.equal(hypergradient_dot(x, x), reference.hypergradient_dot(x, x))
    assert mts_fast.virtual_update is virtual_update
