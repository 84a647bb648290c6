"""Row 6 by forward mode takes ReLUs and BatchNorm statistics from the training forward, and counts
its batches only where something reads the number; against torch's own derivative."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from device_work import Launches
from torch import nn
from torch.func import functional_call

from mts_fast.hypergradient import LabelledBatch, Objective
from mts_fast.hypergradient.forward_mode import ForwardMode

WIDTH = 4
LABELS = torch.arange(8) % WIDTH


class Residual(nn.Module):
    """Two convolutions with BatchNorm and ReLU, and ReLU after the sum."""

    def __init__(self, relu=F.relu, momentum=0.1, affine=True):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(WIDTH, WIDTH, 3, padding=1) for _ in range(2))
        norm = {"momentum": momentum, "affine": affine}
        self.norms = nn.ModuleList(nn.BatchNorm2d(WIDTH, **norm) for _ in range(2))
        self.relu = relu

    def forward(self, x):
        y = self.relu(self.norms[0](self.convs[0](x)))
        return self.relu(self.norms[1](self.convs[1](y)) + x).mean((2, 3))


class ReadsItsCounter(Residual):
    """The number of batches before and after the BatchNorm has counted one."""

    def forward(self, x):
        counter = self.norms[0].num_batches_tracked
        x = super().forward(x * (1 + counter))
        (after,) = torch.stack([counter]).double()
        return x * after + float(counter)


class ComputesOtherwise(Residual):
    """Without gradients there is one more call before the ReLU, and another one is not applied."""

    def forward(self, x):
        y = self.norms[0](self.convs[0](x))
        if not torch.is_grad_enabled():
            y = y * 1
        y = self.norms[1](self.convs[1](self.relu(y)))
        return self.relu(y).mean((2, 3))


def settled(model):
    """With parameters of BatchNorm that are not 1 and 0, and some batches behind it."""
    model = model.double()
    for norm in model.norms:
        if norm.affine:
            nn.init.normal_(norm.weight, 1.0)
            nn.init.normal_(norm.bias)
        norm.num_batches_tracked.fill_(3)
    return model


def inputs():
    torch.manual_seed(3)
    return torch.randn(len(LABELS), WIDTH, 5, 5, dtype=torch.float64)


def dots_of(model, direction, gradients=2):
    parameters = list(model.parameters())
    linearization = ForwardMode(Objective(model), parameters).linearize(
        LabelledBatch(inputs(), LABELS), gradients=gradients
    )
    if gradients:
        linearization.gradient(torch.ones(len(LABELS)))
    return linearization, lambda: linearization.dots(direction)


def torchs(model, direction):
    """The derivative of the losses by torch's own forward mode, on copies of the buffers."""
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    with torch.no_grad(), forward_ad.dual_level():
        pairs = zip(model.named_parameters(), direction, strict=True)
        duals = {name: forward_ad.make_dual(p.detach(), v.clone()) for (name, p), v in pairs}
        output = functional_call(model, {**duals, **buffers}, (inputs(),))
        return forward_ad.unpack_dual(F.cross_entropy(output, LABELS, reduction="none")).tangent


MODELS = {
    "functions": Residual,
    "method": lambda: Residual(torch.Tensor.relu),
    "in place": lambda: Residual(lambda x: F.relu(x, inplace=True)),
    "in place by torch.relu_": lambda: Residual(torch.relu_),
    "by name": lambda: Residual(lambda x: F.relu(x, inplace=False)),
    "average of all batches": lambda: Residual(momentum=None),
    "without parameters": lambda: Residual(affine=False),
    "otherwise": ComputesOtherwise,
    "its counter": ReadsItsCounter,
}


@pytest.mark.parametrize("name", list(MODELS))
def test_dots_are_torchs(name):
    torch.manual_seed(0)
    model = settled(MODELS[name]())
    direction = [torch.randn_like(p) for p in model.parameters()]
    truth = torchs(model, direction)
    _, dots = dots_of(model, direction)
    before = {name: b.clone() for name, b in model.named_buffers()}
    torch.testing.assert_close(dots(), truth, rtol=1e-10, atol=1e-12)
    for name, b in model.named_buffers():
        assert torch.equal(b, before[name])


def test_what_is_known_is_not_computed_again():
    torch.manual_seed(0)
    model = settled(Residual())
    direction = [torch.randn_like(p) for p in model.parameters()]
    _, dots = dots_of(model, direction)
    with Launches() as known:
        dots()
    _, dots = dots_of(model, direction, gradients=0)
    with Launches() as unknown:
        dots()
    assert known.by_name["relu"] == 0
    assert unknown.by_name["relu"] == 2
    # a product of three for each convolution, and of the first, whose input has no tangent, of two
    assert known.by_name["convolution"] == 3
    # w' / deviation and b' less the mean's part: one launch for all layers
    assert known.by_name["_foreach_addcmul"] == 1
    assert known.by_name["mul"] < unknown.by_name["mul"]


def test_a_result_that_was_written_to_is_not_used():
    torch.manual_seed(0)
    model = settled(Residual())
    direction = [torch.randn_like(p) for p in model.parameters()]
    truth = torchs(model, direction)
    linearization, dots = dots_of(model, direction, gradients=1)
    known = [call.rectified for call in linearization._calls]
    assert sum(map(len, known)) == 2
    for results in known:
        for result in results.values():
            with torch.no_grad():
                result.tensor.add_(1.0)
    torch.testing.assert_close(dots(), truth, rtol=1e-10, atol=1e-12)


def test_a_counter_is_as_it_has_to_be_when_something_reads_it():
    """Of a model that reads it, the dots depend on the number."""
    torch.manual_seed(0)
    model = settled(ReadsItsCounter())
    direction = [torch.randn_like(p) for p in model.parameters()]
    at_three = dots_of(model, direction)[1]()
    for norm in model.norms:
        norm.num_batches_tracked.fill_(7)
    assert not torch.allclose(at_three, dots_of(model, direction)[1]())
