"""Running at other parameter values (theta', theta + e v) reaches every form of model.

Values are copied into the parameters' own memory. Tensors put in their place, or memory put under
them (`.data`), would be ignored in silence by a model that holds a view of a parameter, by compiled
and sharded ones: each of these is here.
"""

import copy
import os
import sys

import pytest
import torch
import torch.distributed as dist
from comparison import assert_bitwise
from torch import nn
from torch.nn.utils import parametrizations

from mts_fast._isolation import replaced_parameters

X = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class HoldsAView(nn.Module):
    """A view made once, as of weights that are kept flat."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12))
        self.matrix = self.weight.detach().view(3, 4)

    def forward(self, x):
        return x @ self.matrix.T + self.weight.sum()


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.a(x).tanh())


class Recurrent(nn.Module):
    """torch keeps the weights of a recurrent layer in a list of its own."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 3)

    def forward(self, x):
        return self.lstm(x[:, None])[0]


MODELS = {
    "plain": lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)),
    "holds a view": HoldsAView,
    "tied": Tied,
    "recurrent": Recurrent,
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(4, 3)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(4, 3)),
}


def made(name):
    torch.manual_seed(0)
    model = MODELS[name]().double()
    if name == "holds a view":
        model.matrix = model.weight.detach().view(3, 4)
    return model


def assert_swapped(model, parameters, run, expected_of):
    """The output at other values is that of a model which has them; afterwards nothing is left."""
    values = [p.detach() * 1.5 + 0.1 for p in parameters]
    before = run()
    saved = [p.detach().clone() for p in parameters]
    versions = [p._version for p in parameters]
    expected = expected_of(values)
    with replaced_parameters(parameters, values):
        inside = run()
    assert not torch.allclose(before, inside), "the swap was ignored"
    torch.testing.assert_close(inside, expected)
    assert_bitwise([p.detach() for p in parameters], saved)
    assert [p._version for p in parameters] == versions
    assert_bitwise(run(), before)


def with_values(model):
    """A function of values: what a copy of the model returns with them."""

    def run(values):
        other = copy.deepcopy(model)
        with torch.no_grad():
            for p, value in zip(other.parameters(), values, strict=True):
                p.copy_(value)
        if isinstance(other, HoldsAView):
            other.matrix = other.weight.detach().view(3, 4)
        return other(X).detach()

    return run


@pytest.mark.parametrize("how", ["eager", "compiled", "scripted"])
@pytest.mark.parametrize("name", MODELS)
def test_every_model_runs_at_the_values(name, how):
    model = made(name)
    called = model
    if how == "compiled":
        called = torch.compile(model, backend="aot_eager")
    elif how == "scripted":
        if name in ("weight norm", "orthogonal", "holds a view"):
            pytest.skip("torch.jit.script does not take it")
        called = torch.jit.script(model)
    assert_swapped(model, list(model.parameters()), lambda: called(X).detach(), with_values(model))


@pytest.fixture
def group(tmp_path):
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


needs_gloo = pytest.mark.skipif(
    not dist.is_available() or sys.platform != "linux" or os.environ.get("WORLD_SIZE") is not None,
    reason="needs gloo",
)


@needs_gloo
def test_a_data_parallel_model(group):
    model = made("plain")
    wrapped = nn.parallel.DistributedDataParallel(model)
    assert_swapped(
        model, list(wrapped.parameters()), lambda: wrapped(X).detach(), with_values(model)
    )


@needs_gloo
def test_a_sharded_model(group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = made("plain")
    whole = with_values(copy.deepcopy(model))
    # the root usually stays gathered after a forward, and would not see its shards until a backward
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)), reshard_after_forward=True)
    parameters = list(model.parameters())
    assert any(type(p).__name__ == "DTensor" or hasattr(p, "full_tensor") for p in parameters)
    before = model(X).detach()
    values = [p.detach() * 1.5 + 0.1 for p in parameters]
    saved = [p.detach().full_tensor().clone() for p in parameters]
    with replaced_parameters(parameters, values):
        inside = model(X).detach()
    assert not torch.allclose(before, inside), "the swap was ignored"
    torch.testing.assert_close(inside, whole([v.full_tensor() for v in values]))
    assert_bitwise([p.detach().full_tensor() for p in parameters], saved)
    assert_bitwise(model(X).detach(), before)


def test_a_graph_of_before_stays_valid():
    model = made("plain")
    parameters = list(model.parameters())
    loss = model(X).square().sum()
    with replaced_parameters(parameters, [p.detach() + 1 for p in parameters]):
        torch.autograd.grad(model(X).sum(), parameters)
    again = torch.autograd.grad(loss, parameters)
    expected = torch.autograd.grad(model(X).square().sum(), parameters)
    assert_bitwise(list(again), list(expected))
