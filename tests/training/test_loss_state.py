"""Loss modules keep statistics: a step moves them once; labels stay as they are."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from comparison import relative
from small_steps import Base, batch, plain_model, step_of
from torch import nn

from mts_fast.hypergradient import ENGINES


class RunningNorm(nn.Module):
    """A loss with a running statistic that is its divisor, as in AdaFace."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean_norm", torch.full((), 5.0).double())
        self.modes = []

    def forward(self, logits, labels):
        self.modes.append((len(labels), self.training))
        if self.training:
            self.mean_norm.mul_(0.9).add_(0.1 * logits.detach().norm(dim=1).mean())
        return F.cross_entropy(logits / self.mean_norm.clone(), labels, reduction="none")

    def method(self, logits, labels):
        return self(logits, labels)


@pytest.mark.parametrize("as_method", [False, True])
@pytest.mark.parametrize("engine", ["auto", *ENGINES])
def test_a_loss_module_belongs_to_the_world(engine, as_method):
    model = Base()
    model.forward = lambda x: model.b(torch.tanh(model.a(x)))
    loss = RunningNorm()
    plain = copy.deepcopy(loss)
    step = step_of(model, engine=engine, loss=loss.method if as_method else loss)
    arguments = batch(0)
    plain(model(arguments["inputs"]), arguments["labels"])
    result = step(**arguments)
    assert relative(loss.mean_norm, plain.mean_norm) < 1e-12
    assert result.self_check < 1e-6
    assert {mode for size, mode in loss.modes if size == 7} == {False} and loss.training


def test_a_loss_that_writes_into_the_labels():
    def loss(logits, labels):
        labels[labels == 2] = 0
        return F.cross_entropy(logits, labels, reduction="none")

    model = Base()
    model.forward = lambda x: model.b(torch.tanh(model.a(x)))
    step = step_of(model, loss=loss)
    for seed in range(2):
        arguments, untouched = batch(seed), batch(seed)
        step(**arguments)
        assert torch.equal(arguments["labels"], untouched["labels"])
        assert torch.equal(arguments["val_labels"], untouched["val_labels"])


@pytest.mark.parametrize("kind", ["module", "partial", "lambda"])
def test_a_loss_module_is_found_wherever_it_is_carried(kind):
    def call(module, logits, labels):
        return module(logits, labels)

    loss = RunningNorm()
    carried = {
        "module": loss,
        "partial": functools.partial(call, loss),
        "lambda": lambda logits, labels: loss(logits, labels),
    }[kind]
    plain, model = copy.deepcopy(loss), plain_model()
    step = step_of(model, loss=carried)
    arguments = batch(0)
    plain(model(arguments["inputs"]), arguments["labels"])
    step(**arguments)
    assert relative(loss.mean_norm, plain.mean_norm) < 1e-12
