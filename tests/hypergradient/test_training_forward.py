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


class ReadsAView(Residual):
    """The same through tensors of the counter's memory."""

    def forward(self, x):
        counter = self.norms[0].num_batches_tracked
        views = counter.detach(), counter.view(1), counter.data
        return super().forward(x) * sum(v.sum().double() for v in views)


class Watched(Residual):
    """Hooks where there are gradients, as of a tool that looks at activations."""

    def forward(self, x):
        y = self.norms[0](self.convs[0](x))
        if y.requires_grad:
            y.register_hook(lambda g: None)
            y.retain_grad()
        n = -y
        return (F.relu(y) + 2 * F.relu(n)).mean((2, 3))


class Extra(Residual):
    """A layer is called once more where there are gradients."""

    def forward(self, x):
        y = F.relu(self.norms[0](self.convs[0](x)))
        if y.requires_grad:
            self.norms[0](self.convs[0](-x))
        z = F.relu(self.norms[0](self.convs[0](y)))
        return F.relu(self.norms[1](self.convs[1](z)) - z).mean((2, 3))


class ExtraOfAnotherSize(Residual):
    """The same, of the same functions with another number among their arguments."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm2d(WIDTH, track_running_stats=False)])

    def forward(self, x):
        y = F.relu(self.norms[0](self.convs[0](x)))
        if y.requires_grad:
            F.relu(self.norms[0](self.convs[0](x * 0.5)))
        z = F.relu(self.norms[0](self.convs[0](x * 2.0)))
        return (y + z).mean((2, 3))


class Branches(Residual):
    """Without gradients another tensor is rectified, by the same functions."""

    def forward(self, x):
        y = self.norms[0](self.convs[0](x))
        n = -y
        first, second = (y, n) if y.requires_grad else (n, y)
        rectified = F.relu(first), F.relu(second)
        positive, negative = rectified if y.requires_grad else rectified[::-1]
        return (positive - 3 * negative).mean((2, 3))


class InPlace(Residual):
    """Without gradients sums are made in place."""

    def forward(self, x):
        y = F.relu(self.norms[0](self.convs[0](x)))
        z = y + x if y.requires_grad else y.add_(x)
        return self.norms[1](self.convs[1](z)).mean((2, 3))


class CopiesItsInput(Residual):
    """In another memory format, which a view then needs."""

    def forward(self, x):
        x = torch.clone(x, memory_format=torch.channels_last)
        rows = x.permute(0, 2, 3, 1).view(-1, WIDTH)
        return super().forward(x) + rows.view(len(x), -1, WIDTH).mean(1)


class TwoNorms(Residual):
    """Two BatchNorms read one convolution, and one of them a part of it."""

    def forward(self, x):
        y = self.convs[0](x)
        a, b = self.norms[0](y), self.norms[1](y)
        return (F.relu(a) * F.gelu(b) + self.norms[1](y.flip(0))).mean((2, 3))


class ByFunction(Residual):
    """BatchNorm by its function, with parameters that are detached or views."""

    def __init__(self, weight, bias, shape=(WIDTH,)):
        super().__init__()
        self.weight, self.bias = weight, bias
        self.scale, self.shift = (nn.Parameter(torch.randn(shape)) for _ in range(2))

    def forward(self, x):
        y = self.convs[0](x)
        weight, bias = self.weight(self.scale), self.bias(self.shift)
        y = F.batch_norm(y, None, None, weight, bias, True)
        return F.relu(y).mean((2, 3))


def unchanged(t):
    return t


def settled(model):
    """With parameters of BatchNorm that are not 1 and 0, and some batches behind it."""
    model = model.double().train()
    for norm in model.norms:
        if norm.affine:
            nn.init.normal_(norm.weight, 1.0)
            nn.init.normal_(norm.bias)
        if norm.track_running_stats:
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
    "its counter": ReadsItsCounter,
    "a view of its counter": ReadsAView,
    "hooks": Watched,
    "an extra call": Extra,
    "an extra call of another size": ExtraOfAnotherSize,
    "branches": Branches,
    "in place without gradients": InPlace,
    "a copy of its input": CopiesItsInput,
    "two norms of one output": TwoNorms,
    "weight detached": lambda: ByFunction(torch.Tensor.detach, unchanged),
    "bias detached": lambda: ByFunction(unchanged, torch.Tensor.detach),
    "part of a parameter": lambda: ByFunction(*[lambda t: t[:WIDTH]] * 2, (2 * WIDTH,)),
    "another shape": lambda: ByFunction(*[lambda t: t.view(-1)] * 2, (1, WIDTH, 1, 1)),
}


@pytest.mark.parametrize("name", list(MODELS))
def test_dots_are_torchs(name):
    torch.manual_seed(0)
    model = settled(MODELS[name]())
    direction = [torch.randn_like(p) for p in model.parameters()]
    truth = torchs(model, direction)
    linearization, dots = dots_of(model, direction)
    before = {name: b.clone() for name, b in model.named_buffers()}
    torch.testing.assert_close(dots(), truth, rtol=1e-10, atol=1e-12)
    for name, b in model.named_buffers():
        assert torch.equal(b, before[name])
    assert all(g is None or g.isfinite().all() for g in linearization.gradient(torch.ones(8)))


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
    known = [c.result for c in linearization._calls if c.weight is None and c.result is not None]
    assert len(known) == 2
    for result in known:
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


class Mapped(Residual):
    """A linear map of several weights at once before BatchNorm."""

    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(torch.randn(2, WIDTH, WIDTH))
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x):
        x = x.mean((2, 3))
        return self.norm(torch.vmap(lambda w: F.linear(x, w))(self.weights).sum(0))


def test_tensors_of_torch_func_are_left_alone():
    torch.manual_seed(0)
    model = settled(Mapped())
    linearization, _ = dots_of(model, [], gradients=2)
    assert linearization._calls
