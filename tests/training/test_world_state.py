"""A step moves a model's buffers, generators and inputs as one plain forward does."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from comparison import relative
from small_steps import CLASSES, Base, batch, generators, plain_model, set_generators, step_of
from torch import nn

from mts_fast.hypergradient import ENGINES


class Reassigned(Base):
    """A running centre that forward replaces, as in DINO's centring."""

    def __init__(self):
        super().__init__()
        self.register_buffer("centre", torch.zeros(8).double())
        self.register_buffer("late", None)

    def forward(self, x):
        h = self.a(x)
        if self.training:
            self.centre = 0.9 * self.centre + 0.1 * h.detach().mean(0)
            self.late = h.detach()[:1]
        return self.b(torch.tanh(h - self.centre))


class InPlace(Reassigned):
    def forward(self, x):
        h = self.a(x)
        if self.training:
            self.centre.mul_(0.9).add_(h.detach().mean(0), alpha=0.1)
        return self.b(torch.tanh(h - self.centre.clone()))


class NumpyMask(Base):
    def forward(self, x):
        h = torch.tanh(self.a(x))
        if self.training:
            h = h * torch.as_tensor(np.random.rand(len(h), 8) > 0.3)
        return self.b(h)


class PythonMask(Base):
    def forward(self, x):
        h = torch.tanh(self.a(x))
        if self.training:
            h = h * torch.tensor([[random.random() > 0.3 for _ in range(8)] for _ in h])
        return self.b(h)


class WritesInput(Base):
    def forward(self, x):
        return self.b(torch.tanh(self.a(x.div_(2.0))))


MODELS = {m.__name__: m for m in (Reassigned, InPlace, NumpyMask, PythonMask, WritesInput)}


@pytest.mark.parametrize("engine", ["auto", *ENGINES])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_one_plain_forward(name, engine):
    """Buffers, generators, inputs and parameters end as after a plain step with these weights."""
    model = MODELS[name]()
    plain = copy.deepcopy(model)
    step = step_of(model, engine=engine)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for seed in range(3):
        arguments, untouched = batch(seed), batch(seed)
        set_generators(seed)
        result = step(**arguments)
        after = generators()
        set_generators(seed)
        optimizer.zero_grad()
        losses = F.cross_entropy(
            plain(arguments["inputs"].clone()), arguments["labels"], reduction="none"
        )
        (result.normalized_weights * losses).sum().backward()
        optimizer.step()
        assert str(after) == str(generators())
        assert all(torch.equal(arguments[k], untouched[k]) for k in arguments)
        assert relative(result.losses, losses.detach()) < 1e-12
        for (n, value), expected in zip(
            model.state_dict().items(), plain.state_dict().values(), strict=True
        ):
            assert relative(value, expected) < 1e-10, n
        # dots against double backward, differences to their own error
        assert result.self_check < 1e-6


class Energy(nn.Module):
    """Differentiates inside forward, as a force field does."""

    def __init__(self):
        super().__init__()
        self.w = nn.Linear(4, CLASSES)

    def forward(self, x):
        x = x.detach().requires_grad_()
        (force,) = torch.autograd.grad(self.w(x).square().sum(), x, create_graph=True)
        return self.w(force)


def test_the_error_of_a_model_that_differentiates_inside_has_a_hint():
    model = Energy().double()
    step = step_of(model, engine="finite_difference")
    with pytest.raises(RuntimeError, match=r"decorate its forward with torch\.enable_grad"):
        step(**batch(0))
    with torch.enable_grad():
        model.forward = torch.enable_grad()(model.forward)
    assert step(**batch(0)).self_check < 1e-6


def test_a_model_that_begins_to_write_is_named():
    class Later(Base):
        writes = False

        def forward(self, x):
            if self.writes:
                x.mul_(2.0)
            return self.b(torch.tanh(self.a(x)))

    model = Later()
    step = step_of(model)
    step(**batch(0))
    model.writes = True
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="inputs must be left as they are by the model"):
        step(**batch(1))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


class Overlapping(nn.Module):
    """Gradients of the biases are views of one tensor; that of q is an expanded tensor."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lin = nn.Linear(4, 3, bias=False)
        self.b0, self.b1 = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(1))
        self.b2, self.q = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.ones(5))
        self.double()

    def forward(self, x):
        return self.lin(x) + torch.cat([self.b1, self.b2]) + self.b0 + self.q.sum()


@pytest.mark.parametrize("engine", ["auto", "forward_mode", "double_backward"])
@pytest.mark.parametrize("clip", [None, 0.01])
def test_gradients_that_share_memory_are_clipped_and_unscaled_once(clip, engine):
    model = Overlapping()
    plain = copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    step = step_of(model, engine=engine, max_grad_norm=clip, scaler=scaler)
    arguments = batch(0)
    result = step(**arguments)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    losses = F.cross_entropy(plain(arguments["inputs"]), arguments["labels"], reduction="none")
    (result.normalized_weights * losses).sum().backward()
    if clip is not None:
        torch.nn.utils.clip_grad_norm_(plain.parameters(), clip)
    optimizer.step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-12, atol=1e-14)


def test_modules_that_are_put_in_between_calls_are_seen():
    model = plain_model()
    step = step_of(model, val_loss=lambda z, y: F.cross_entropy(z, y, reduction="none"))
    step(**batch(0))
    model[1] = nn.Sequential(nn.Tanh(), nn.Dropout(0.5))
    step(**batch(1))
    assert model[1][1].training
    model[1] = nn.Sequential(nn.Tanh(), nn.Dropout(0.5))
    step.weights(batch(2)["inputs"], batch(2)["labels"], val_inputs=batch(2)["val_inputs"])
    assert model[1][1].training


class Decaying(Base):
    """A forward that scales a weight, with or without a change of its version counter."""

    def __init__(self, *, counted):
        super().__init__()
        self.counted = counted

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                (self.a.weight if self.counted else self.a.weight.data).mul_(0.9)
        return self.b(torch.tanh(self.a(x)))


@pytest.mark.parametrize("counted", [True, False])
def test_a_forward_that_writes_to_a_parameter(counted):
    model = Decaying(counted=counted)
    plain = copy.deepcopy(model)
    step = step_of(model)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for seed in range(3):
        arguments = batch(seed)
        p = step(**arguments).normalized_weights
        losses = F.cross_entropy(plain(arguments["inputs"]), arguments["labels"], reduction="none")
        optimizer.zero_grad()
        (p * losses).sum().backward()
        optimizer.step()
        for name, parameter in plain.named_parameters():
            assert relative(model.get_parameter(name), parameter) < 1e-12, (seed, name)
