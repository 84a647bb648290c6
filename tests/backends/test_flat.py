"""Small tensors side by side: the reference's values, in fewer launches."""

import pytest
import torch
from comparison import assert_bitwise, snapshot
from device_work import Launches

from mts_fast.backends import flat
from mts_fast.ops.virtual_update import optimizer_states, trainable_parameters
from mts_fast.reference.virtual_update import masked_direction
from mts_fast.reference.virtual_update import virtual_update as one_update

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.01, maximize=True),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "muon": lambda p: torch.optim.Muon(p, lr=0.01),
}
# no axes, no entry, matrices, an image kernel, one that is too long to lie beside others
SHAPES = ((), (7,), (0,), (3, 5), (4, 3, 2, 2), (1, 1), (90, 100), (6,), (2, 3))


def make(name, steps, dtype=torch.float32, change=lambda t: t):
    shapes = [s for s in SHAPES if len(s) == 2] if name == "muon" else SHAPES
    g = torch.Generator().manual_seed(0)

    def draw():
        return [change(torch.randn(s, generator=g).to(dtype)) for s in shapes]

    parameters = [torch.nn.Parameter(t) for t in draw()]
    half = len(parameters) // 2
    groups = [{"params": parameters[:half]}, {"params": parameters[half:], "lr": 0.003}]
    optimizer = OPTIMIZERS[name](groups)
    for _ in range(steps):
        for p, gradient in zip(parameters, draw(), strict=True):
            p.grad = gradient
        optimizer.step()
    return optimizer, draw(), draw()


def rows_of(optimizer):
    parameters = [p.detach() for p in trainable_parameters(optimizer)]
    return parameters, list(optimizer_states(optimizer).values())


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_equals_the_reference_bitwise(name, steps):
    optimizer, gradients, along = make(name, steps)
    before = snapshot(optimizer=optimizer)
    parameters, states = rows_of(optimizer)
    updated = flat.virtual_update(parameters, gradients, states)
    assert_bitwise(updated, list(map(one_update, parameters, gradients, states)))
    largest = torch.tensor(2.0)
    directions, counts = flat.hypergradient_direction(
        parameters, gradients, states, along, 0.5, largest
    )
    rows = zip(parameters, gradients, states, along, strict=True)
    truth = [masked_direction(*row, 0.5, largest) for row in rows]
    assert_bitwise(directions, [direction for direction, _ in truth])
    masks = [int(noise.sum()) for _, noise in truth if noise is not None]
    assert sum(map(int, counts)) == sum(masks)
    assert_bitwise(snapshot(optimizer=optimizer), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    optimizer, gradients, _ = make("adamw", 2, dtype)
    parameters, states = rows_of(optimizer)
    updated = flat.virtual_update(parameters, gradients, states)
    assert_bitwise(updated, list(map(one_update, parameters, gradients, states)))
    assert {u.dtype for u in updated} == {dtype}


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t,
        lambda t: t.t().contiguous().t() if t.ndim == 2 else t,
    ],
)
def test_memory_layouts_are_kept(change):
    optimizer, gradients, _ = make("adamw", 2, change=change)
    parameters, states = rows_of(optimizer)
    gradients[3] = gradients[3].contiguous()  # one that lies otherwise than its parameter
    updated = flat.virtual_update(parameters, gradients, states)
    assert_bitwise(updated, list(map(one_update, parameters, gradients, states)))
    assert [u.stride() for u in updated] == [p.stride() for p in parameters]


def test_perturb():
    optimizer, direction, _ = make("sgd", 0)
    parameters, _ = rows_of(optimizer)
    direction[1] = direction[1].double()  # another dtype than its parameter's
    scale = torch.tensor(0.3)
    moved = flat.perturb(parameters, direction, scale)
    truth = [(p + scale * v).to(p.dtype) for p, v in zip(parameters, direction, strict=True)]
    assert_bitwise(moved, truth)


@pytest.mark.parametrize(("name", "most"), [("nesterov", 10), ("adamw", 26)])
def test_many_tensors_take_the_launches_of_one(name, most):
    parameters = [torch.nn.Parameter(torch.randn(5, 3)) for _ in range(100)]
    optimizer = OPTIMIZERS[name](parameters)
    for p in parameters:
        p.grad = torch.randn(5, 3)
    optimizer.step()
    parameters, states = rows_of(optimizer)
    gradients = [torch.ones(5, 3)] * 100
    with Launches() as launches:
        flat.virtual_update(parameters, gradients, states)
    assert sum(launches.by_name.values()) <= most


def test_parts_are_bounded(monkeypatch):
    """Temporary memory does not grow with the model."""
    from mts_fast import _multi_tensor

    monkeypatch.setitem(_multi_tensor.CHUNK, "cpu", 20)
    optimizer, gradients, _ = make("adamw", 2)
    parameters, states = rows_of(optimizer)
    updated = flat.virtual_update(parameters, gradients, states)
    assert_bitwise(updated, list(map(one_update, parameters, gradients, states)))
