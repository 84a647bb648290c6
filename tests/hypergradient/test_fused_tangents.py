"""Tangents of BatchNorm and of linear maps whose outputs are known, against torch's."""

import itertools
from contextlib import nullcontext

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from mts_fast.hypergradient import LabelledBatch, Objective, fused_tangents
from mts_fast.hypergradient.forward_mode import ForwardMode
from mts_fast.hypergradient.fused_tangents import FusedTangents
from mts_fast.hypergradient.training_forward import RecordedForward

LAYERS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


@pytest.mark.parametrize("has", list(itertools.product([True, False], repeat=3)))
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 7), (6, 5, 4, 3), (3, 5, 2, 2, 2)])
def test_batch_norm_equals_torchs_tangent(shape, affine, has):
    """With and without tangents of the input, the weight and the bias; far from zero mean."""
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64) + 3
    layer = LAYERS[len(shape)](5, affine=affine).double()
    if affine:
        nn.init.normal_(layer.weight)
    tangents = [torch.randn(s, dtype=torch.float64) for s in (shape, 5, 5)]
    tangents = [t if there else None for t, there in zip(tangents, has, strict=True)]
    outcomes = []
    for mode in (nullcontext(), FusedTangents()):
        layer.reset_running_stats()
        with torch.no_grad(), forward_ad.dual_level(), mode:

            def dual(value, tangent):
                return value if tangent is None else forward_ad.make_dual(value, tangent)

            named = {
                n: dual(p.detach(), t)
                for (n, p), t in zip(layer.named_parameters(), tangents[1:], strict=False)
            }
            y, tangent = forward_ad.unpack_dual(
                functional_call(layer, named, (dual(x, tangents[0]),))
            )
        if tangent is None:
            tangent = torch.zeros_like(y)
        outcomes.append((y, tangent, layer.running_mean.clone(), layer.running_var.clone()))
    for expected, fused in zip(*outcomes, strict=True):
        torch.testing.assert_close(fused, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("change", ["eval", "one sample", "half"])
def test_what_is_left_to_torch(change):
    """Eval mode, its own errors, and mixed dtypes."""
    layer = nn.BatchNorm1d(3)
    x = torch.randn(4, 3)
    if change == "eval":
        layer.eval()
    if change == "one sample":
        with FusedTangents(), pytest.raises(ValueError, match="more than 1 value"):
            layer(x[:1])
        return
    x = x.bfloat16() if change == "half" else x
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.randn_like(x))
        expected = layer(dual)
        layer.reset_running_stats()
        with FusedTangents():
            fused = layer(dual)
    assert torch.equal(fused, expected)


def test_arguments_by_name():
    x, weight = torch.randn(4, 3), torch.ones(3)
    named = {"input": x, "running_mean": None, "running_var": None, "training": True}
    with RecordedForward() as recorded:
        F.batch_norm(**named, weight=weight)
    assert [call.statistics for call in recorded.calls] == [None]
    with torch.no_grad(), forward_ad.dual_level(), FusedTangents():
        named["input"] = forward_ad.make_dual(x, torch.randn(4, 3))
        assert forward_ad.unpack_dual(F.batch_norm(**named, weight=weight)).tangent is not None


class Net(nn.Module):
    """Convolutions and a linear layer before BatchNorm, one without, one frozen, one reused."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(4)
        self.frozen = nn.Conv2d(4, 4, 1)
        self.norm3 = nn.BatchNorm2d(4)
        self.hidden = nn.Linear(4, 6)
        self.norm4 = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 5)
        self.frozen.requires_grad_(False)

    def forward(self, x):
        x = F.relu(self.norm1(self.first(x)))
        for _ in range(2):
            x = F.relu(self.norm2(self.second(x)))
        x = F.relu(self.norm3(self.frozen(x)))
        x = F.dropout(x, 0.3, self.training)
        return self.head(self.norm4(self.hidden(x.mean((2, 3)))))


def dots_of(model, gradients):
    """Dots, and the gradient for uniform weights after them where there is a second one."""
    torch.manual_seed(0)
    x = torch.randn(8, 3, 6, 6, dtype=torch.float64)
    batch = LabelledBatch(x, torch.arange(8) % 5)
    parameters = [p for p in model.parameters() if p.requires_grad]
    g = torch.Generator().manual_seed(1)
    direction = [torch.randn(p.shape, generator=g, dtype=p.dtype) for p in parameters]
    engine = ForwardMode(Objective(model), parameters)
    torch.manual_seed(2)
    linearization = engine.linearize(batch, gradients=gradients)
    if gradients:
        linearization.gradient(torch.ones(8))
    dots = linearization.dots(direction)
    return dots, linearization.gradient(torch.ones(8)) if gradients > 1 else None


def test_outputs_of_the_training_forward_are_used(monkeypatch):
    torch.manual_seed(0)
    model = Net().double()
    calls = []

    def counting(func, *rest, **named):
        calls.append(func)
        return with_tangent(func, *rest, **named)

    with_tangent = fused_tangents._with_tangent
    monkeypatch.setattr(fused_tangents, "_with_tangent", counting)
    dots, _ = dots_of(model, 2)
    assert len(calls) == 5  # all but the head
    truth, _ = dots_of(model, 0)
    torch.testing.assert_close(dots, truth, rtol=1e-12, atol=1e-13)


def test_gradients_after_the_dots_are_those_before():
    torch.manual_seed(0)
    model = Net().double()
    _, after = dots_of(model, 2)
    parameters = [p for p in model.parameters() if p.requires_grad]
    torch.manual_seed(0)
    x = torch.randn(8, 3, 6, 6, dtype=torch.float64)
    torch.manual_seed(2)
    losses = F.cross_entropy(model(x), torch.arange(8) % 5, reduction="sum")
    for mine, truth in zip(after, torch.autograd.grad(losses, parameters), strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-12, atol=1e-13)


class Preactivation(nn.Module):
    """A sum in place between the convolution and the BatchNorm that reads it."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.norm1, self.norm2, self.head = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.Linear(3, 5)

    def forward(self, x):
        y = self.second(F.relu(self.norm1(self.first(x))))
        y += x
        return self.head(F.relu(self.norm2(y)).mean((2, 3)))


def before_norm(activation):
    layers = nn.Conv2d(3, 4, 3), activation, nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4, 5))


IN_PLACE = {
    "relu": lambda: before_norm(nn.ReLU(inplace=True)),
    "leaky relu": lambda: before_norm(nn.LeakyReLU(0.1, inplace=True)),
    "elu": lambda: before_norm(nn.ELU(inplace=True)),
    "silu": lambda: before_norm(nn.SiLU(inplace=True)),
    "preactivation": Preactivation,
}


@pytest.mark.parametrize("gradients", [1, 2])
@pytest.mark.parametrize("name", list(IN_PLACE))
def test_what_is_written_before_the_norm_is_computed_again(name, gradients):
    torch.manual_seed(0)
    model = IN_PLACE[name]().double()
    dots, after = dots_of(model, gradients)
    truth, _ = dots_of(model, 0)
    torch.testing.assert_close(dots, truth, rtol=1e-12, atol=1e-13)
    assert (after is not None) == (gradients == 2)


def test_statistics_in_float32_of_16_bit_inputs(monkeypatch):
    """As a GPU gives them."""
    real = torch.ops.aten.native_batch_norm

    def widened(*args):
        y, mean, inverse = real(*args)
        return y, mean.float(), inverse.float()

    def backward(t, x, weight, a, b, mean, inverse, *rest):
        return real_backward(t, x, weight, a, b, mean.bfloat16(), inverse.bfloat16(), *rest)

    real_backward = torch.ops.aten.native_batch_norm_backward
    monkeypatch.setattr(torch.ops.aten, "native_batch_norm", widened)
    monkeypatch.setattr(torch.ops.aten, "native_batch_norm_backward", backward)
    layer, x = nn.BatchNorm1d(3).bfloat16(), torch.randn(6, 3).bfloat16()
    with torch.no_grad(), forward_ad.dual_level(), FusedTangents():
        named = {
            n: forward_ad.make_dual(p.detach(), p.detach()) for n, p in layer.named_parameters()
        }
        y = functional_call(layer, named, (forward_ad.make_dual(x, x),))
        assert forward_ad.unpack_dual(y).tangent.dtype == torch.bfloat16


class ReadTwice(nn.Module):
    """BatchNorm is not alone in reading the output of a convolution."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5)

    def forward(self, x):
        y = self.conv(x)
        z = self.norm(y)
        return self.head(z.mean((2, 3)) + y.mean((2, 3)))


def linear_results(recorded):
    return [call.result for call in recorded.calls if call.weight is not None]


def test_an_output_with_another_version_is_not_used():
    torch.manual_seed(0)
    layer, norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    with RecordedForward() as recorded:
        y = layer(torch.randn(2, 3, 5, 5))
        norm(y)
    (call,) = (call for call in recorded.calls if call.weight is not None)
    assert call.has_weight(layer.weight)
    assert not call.has_weight(layer.weight.clone())
    assert call.known() is not None
    with torch.no_grad():
        y.add_(1.0)
    assert call.known() is None


def test_nothing_is_recorded_where_nothing_would_be_kept():
    layer, norm, x = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), torch.randn(2, 3, 5, 5)

    def run(x):
        return norm(layer(x))

    with RecordedForward() as recorded, torch.no_grad():
        run(x)
    assert linear_results(recorded) == [None]
    with RecordedForward() as recorded:
        checkpoint(run, x, use_reentrant=False)
    assert linear_results(recorded) == [None]
    with RecordedForward() as recorded:
        norm(F.relu(layer(x)))  # another layer reads it
    assert linear_results(recorded) == [None]


def test_an_output_that_is_read_twice():
    torch.manual_seed(0)
    model = ReadTwice().double()
    dots, _ = dots_of(model, 2)
    truth, _ = dots_of(model, 0)
    torch.testing.assert_close(dots, truth, rtol=1e-12, atol=1e-13)
