"""virtual_update(..., along=v) on every backend, and what it refuses."""

import pytest
import torch
from comparison import assert_bitwise, relative

from mts_fast import use_backend
from mts_fast.backends.registry import resolve
from mts_fast.backends.triton.eligibility import interpreted, triton_reasons
from mts_fast.ops import virtual_update

needs_triton = pytest.mark.skipif(bool(triton_reasons()), reason="; ".join(triton_reasons()))
OPS = ("virtual_update", "hypergradient_direction", "virtual_update_along")
# one of each family: a scalar kappa, a diagonal one
OPTIMIZERS = {
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.05),
}


def make(name, device, shapes):
    """An optimizer after one step, gradients and a direction."""
    g = torch.Generator().manual_seed(0)
    drawn = [
        [torch.randn(s, generator=g, dtype=torch.float64).to(device) for s in shapes]
        for _ in range(3)
    ]
    optimizer = OPTIMIZERS[name]([torch.nn.Parameter(t) for t in drawn[0]])
    for p, t in zip(optimizer.param_groups[0]["params"], drawn[1], strict=True):
        p.grad = t.clone()
    optimizer.step()
    return optimizer, drawn[1], drawn[2]


@pytest.mark.parametrize("lr", [None, 0.5])  # the optimizer's lr; another one, in kappa only
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_along_is_scale_from_the_same_call(name, lr, backend, device):
    optimizer, gradients, v = make(name, device, ((), (3, 4)))
    update = virtual_update(optimizer, gradients, along=v, hypergradient_lr=lr)
    with use_backend("reference"):
        truth = virtual_update(optimizer, gradients)
        expected = truth.scale(v, lr)
    assert truth.direction is None
    assert_bitwise(update.direction, update.scale(v, lr))
    for mine, exact in zip(
        (*update.parameters, *update.direction), (*truth.parameters, *expected), strict=True
    ):
        assert relative(mine, exact) < 2e-14  # observed 4e-15, of an AdamW kappa that cancels


def test_missing_gradients_and_directions(backend, device):
    """A parameter without a gradient stays, as a copy; without a direction its entry is 0."""
    optimizer, gradients, v = make("adamw", device, ((3,), (4,), (5,)))
    parameters = optimizer.param_groups[0]["params"]
    whole = virtual_update(optimizer, gradients, along=v)
    gradients[0], v[1] = None, None
    update = virtual_update(optimizer, gradients, along=v)
    assert_bitwise(update.parameters[1:], whole.parameters[1:])
    assert torch.equal(update.parameters[0], parameters[0])
    assert update.parameters[0].data_ptr() != parameters[0].data_ptr()
    zeros = [torch.zeros_like(p).detach() for p in parameters]
    assert_bitwise(list(update.direction), [zeros[0], zeros[1], whole.direction[2]])
    assert_bitwise(update.scale(v), update.direction)
    assert_bitwise(list(update.scale([None] * 3)), zeros)


META = torch.ones(3, device="meta")
# for each argument: another device, shape, number, dtype
REFUSED = {
    "gradient_device": (
        [META],
        {},
        ValueError,
        r"gradients\[0\] must be on {} like parameter 0, got",
    ),
    "along_device": (
        None,
        {"along": [META]},
        ValueError,
        r"along\[0\] must be on {} like parameter 0",
    ),
    "along_shape": (
        None,
        {"along": [torch.ones(3, 1)]},
        ValueError,
        r"along\[0\] must be of shape \(3",
    ),
    "along_number": (None, {"along": []}, ValueError, "along must be one per trainable parameter"),
    "along_dtype": (None, {"along": [torch.ones(3).long()]}, TypeError, r"along\[0\] must be a fl"),
    "lr": (None, {"hypergradient_lr": 1.0}, ValueError, "hypergradient_lr must be given together"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_arguments(case, device):
    gradients, options, error, message = REFUSED[case]
    optimizer, drawn, _ = make("nesterov", device, ((3,),))
    with pytest.raises(error, match="virtual_update: " + message.format(device)):
        virtual_update(optimizer, gradients or drawn, **options)


@pytest.mark.parametrize(
    ("direction", "message"),
    [
        ([torch.ones(4)], r"of shape \(3,\), got \(4,\)"),
        ([META], "on .* like parameter 0, got a tensor on meta"),
        ([], r"one per trainable parameter \(1\), got 0"),
    ],
)
def test_refused_directions(direction, message, device):
    optimizer, gradients, _ = make("nesterov", device, ((3,),))
    with pytest.raises(ValueError, match=rf"virtual_update: direction(\[0\])? must be {message}"):
        virtual_update(optimizer, gradients).scale(direction)


@needs_triton
def test_triton_names_what_it_cannot_serve(device):
    optimizer, gradients, v = make("nesterov", device, ((3,),))
    update = virtual_update(optimizer, gradients)
    message = "hypergradient_direction: backend 'triton' cannot run: its kernel has no backward"
    with use_backend("triton"), pytest.raises(RuntimeError, match=message):
        update.scale([v[0].requires_grad_()])
    assert update.scale(v)[0].requires_grad  # auto: the reference follows it
    message = r"virtual_update: gradients\[0\] must be a floating-point tensor, got a float8"
    with use_backend("triton"), pytest.raises(TypeError, match=message):
        virtual_update(optimizer, [gradients[0].to(torch.float8_e4m3fn)])


@pytest.mark.parametrize("op", OPS)
def test_auto_does_not_take_triton(op, device):
    """No GPU has timed it."""
    tensors = [torch.ones(2, device=device)]
    with use_backend("auto"):
        assert "triton" not in resolve(op, tensors).__module__
    if not triton_reasons() and (interpreted() or device.type == "cuda"):
        with use_backend("triton"):
            assert "triton" in resolve(op, tensors).__module__
