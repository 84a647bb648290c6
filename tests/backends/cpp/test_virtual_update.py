"""virtual_update in C++ against the reference, and which tensors its kernel serves."""

import pytest
import torch
from comparison import assert_bitwise, snapshot

from mts_fast import use_backend
from mts_fast.backends.cpp import virtual_update as cpp
from mts_fast.backends.cpp.extension import extension
from mts_fast.ops import virtual_update

needs_cpp = pytest.mark.skipif(not extension().available, reason=extension().reason)
# a scalar, odd sizes, no entry, more than one task of 32768, matrices
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
        updated = virtual_update(optimizer, gradients).parameters
    if "adam" not in name:
        assert_bitwise(updated, expected)
    for mine, truth in zip(updated, expected, strict=True):
        # one ulp of the parameter or of a step of 0.01; observed 0.9 of the first
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(mine, truth, rtol=eps, atol=eps)
    assert_bitwise(snapshot(optimizer=optimizer), before)


@needs_cpp
@pytest.mark.parametrize("lr", [None, 0.5])  # the optimizer's lr; another one, in kappa only
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_direction_equals_reference(name, dtype, steps, lr):
    """kappa v and the number of its masked entries; one gradient is noise."""
    optimizer, gradients = make(name, dtype, steps)
    gradients[4][0] *= 1e-20 if steps == 0 else 0.0
    along = [torch.randn_like(g) for g in gradients]
    scaled = {}
    for backend in ("reference", "cpp"):
        with use_backend(backend):
            scaled[backend] = virtual_update(optimizer, gradients).scale(along, lr)
    mine, truth = scaled["cpp"], scaled["reference"]
    assert torch.equal(mine.masked_entries, truth.masked_entries)
    if name == "adamw" and steps == 0:
        assert mine.masked_entries >= 5
    for a, b in zip(mine, truth, strict=True):
        # relative to each entry; observed 5 of the dtype's eps, where the old moments cancel
        torch.testing.assert_close(a, b, rtol=32 * torch.finfo(dtype).eps, atol=1e-30)


@needs_cpp
def test_groups_and_missing_gradients():
    """Groups have different options; a parameter without a gradient stays, as a copy."""
    g = torch.Generator().manual_seed(0)
    p = [torch.nn.Parameter(torch.randn(5, generator=g)) for _ in range(4)]
    groups = [{"params": p[:2]}, {"params": p[2:], "lr": 0.5, "momentum": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    gradients = [torch.randn(5, generator=g) if i != 2 else None for i in range(4)]
    for backend in ("reference", "cpp"):
        with use_backend(backend):
            updated = virtual_update(optimizer, gradients).parameters
        lrs = [0.1, 0.1, 0.0, 0.5]
        for i in range(4):
            step = 0 if gradients[i] is None else lrs[i] * gradients[i]
            torch.testing.assert_close(updated[i], p[i].detach() - step)
        assert updated[2].data_ptr() != p[2].data_ptr()


@needs_cpp
@pytest.mark.parametrize("gradient_format", ["same", "other"])
def test_memory_formats(gradient_format, monkeypatch):
    """The kernel serves channels_last weights whose gradients have the same strides, and the result
    has these strides, too; the reference serves other pairs."""
    weight = torch.nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last))
    gradient = torch.randn(4, 3, 2, 2)
    if gradient_format == "same":
        gradient = gradient.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    served = []
    planned = cpp._calls

    def calls(*arguments):
        result = planned(*arguments)
        served.extend(len(call.members) for call in result[0])
        return result

    monkeypatch.setattr(cpp, "_calls", calls)
    with use_backend("cpp"):
        (updated,) = virtual_update(optimizer, [gradient]).parameters
    assert torch.equal(updated, weight.detach() - 0.1 * gradient)
    assert served == ([1] if gradient_format == "same" else [])
    assert gradient_format == "other" or updated.stride() == weight.stride()


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
    torch.library.opcheck(
        torch.ops.mts_fast.hypergradient_direction_adam.default,
        (
            parameters,
            gradients,
            [],
            [],
            gradients,
            1e-6,
            *(0.1, 0.9, 0.99),
            *(1e-8, 0, 0),
            True,
            False,
        ),
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
