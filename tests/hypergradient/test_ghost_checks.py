"""How often the ghost engine checks where the samples lie, and what each check costs."""

import pytest
import torch
from ghost_engines import LowRank, SequenceFirst, assert_exact, batch_of, engine_of
from torch import nn
from torch.nn import functional as F

from mts_fast.hypergradient.ghost import Unsupported
from mts_fast.hypergradient.objective import LabelledBatch


def backward_passes(monkeypatch, run):
    calls, grad = [], torch.autograd.grad
    with monkeypatch.context() as patch:
        patch.setattr(torch.autograd, "grad", lambda *a, **k: calls.append(1) or grad(*a, **k))
        run()
    return len(calls)


class Attention(nn.Module):
    """Attention by hand; each sample is classified by a position of its own."""

    def __init__(self):
        super().__init__()
        self.qkv, self.head = nn.Linear(5, 24), nn.Linear(8, 3)

    def forward(self, x):
        size, length, _ = x.shape
        q, k, v = (t.view(size, length, 2, 4).transpose(1, 2) for t in self.qkv(x).split(8, dim=2))
        h = ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)
        h = F.normalize(h - h.mean(-1, keepdim=True), dim=-1)
        return self.head(h[torch.arange(size), torch.full((size,), length - 1)])


# models whose forwards draw, or move axes, without anything between samples
ORDINARY = {
    "plain": lambda: nn.Sequential(nn.Flatten(), nn.Linear(35, 8), nn.Linear(8, 3)),
    "dropout": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(35, 8), nn.Dropout(0.5), nn.Linear(8, 3)
    ),
    "convolution": lambda: nn.Sequential(
        nn.Conv1d(7, 8, 3), nn.GroupNorm(2, 8), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(8, 3)
    ),
    "encoder": SequenceFirst,
    "attention": Attention,
}


@pytest.mark.parametrize("name", ORDINARY)
def test_checks_become_rare(name, monkeypatch):
    engine = engine_of(ORDINARY[name]().double())
    passes = [
        backward_passes(monkeypatch, lambda: engine.linearize(batch_of(6, 7, 5))) for _ in range(16)
    ]
    checked = [number + 1 for number, n in enumerate(passes) if n]
    assert checked == [1, 2, 4, 8, 16]
    # two passes, and one more for layers that a first pass of input gradients does not reach
    assert max(passes) <= 4


def test_a_layer_that_is_never_reached_costs_no_check(monkeypatch):
    engine, batch = engine_of(LowRank().double()), batch_of(4, 7, 5)
    for _ in range(2):
        engine.linearize(batch)
    # whether its gradient is still 0
    assert backward_passes(monkeypatch, lambda: engine.linearize(batch)) <= 2


@pytest.mark.parametrize("size", [6, 7])  # 6: as many samples as positions
def test_the_default_loss_costs_no_check(size, monkeypatch):
    """Its sum over positions is not taken for one over samples, whatever their number."""
    engine = engine_of(nn.Linear(5, 3).double())
    batch = LabelledBatch(torch.randn(size, 6, 5).double(), torch.randint(3, (size, 6)))
    for _ in range(2):
        engine.linearize(batch)
    assert backward_passes(monkeypatch, lambda: engine.linearize(batch)) == 0


def test_losses_of_the_cpp_kernel_cost_no_check(monkeypatch):
    """From 1000 classes on the loss of the default is an operator of this library."""
    engine = engine_of(nn.Sequential(nn.Flatten(), nn.Linear(35, 1000)))
    batch = batch_of(6, 7, 5)
    batch = LabelledBatch(batch.inputs.float(), batch.labels)
    for _ in range(2):
        engine.linearize(batch)
    assert backward_passes(monkeypatch, lambda: engine.linearize(batch)) == 0


@torch.library.custom_op("mts_fast_tests::relu", mutates_args=())
def relu(x: torch.Tensor, reverse: bool) -> torch.Tensor:
    """Of torch's name, with the samples in another order where asked for."""
    return (x.flip(0) if reverse else x).clamp(min=0)


def relu_context(ctx, inputs, output):
    ctx.save_for_backward(output > 0)
    ctx.reverse = inputs[1]


def relu_backward(ctx, grad):
    grad = grad * ctx.saved_tensors[0]
    return grad.flip(0) if ctx.reverse else grad, None


relu.register_autograd(relu_backward, setup_context=relu_context)


class CustomOperator(nn.Module):
    """An operator of a user's own between two layers."""

    def __init__(self):
        super().__init__()
        self.body, self.head, self.reverse = nn.Linear(5, 8), nn.Linear(8, 3), False

    def forward(self, x):
        return self.head(torch.ops.mts_fast_tests.relu(self.body(x), self.reverse))


def test_a_custom_operator_is_not_taken_for_the_one_of_torch_with_its_name():
    model = CustomOperator().double()
    engine, batch = engine_of(model), batch_of(6, 5)
    for _ in range(4):
        engine.linearize(batch)
    model.reverse = True
    with pytest.raises(Unsupported, match=r"body.weight: .*mixe"):
        engine.linearize(batch)


def test_a_sample_with_a_nan_is_not_called_mixed():
    batch = batch_of(6, 5)
    batch.inputs[2] = torch.nan
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    engine = engine_of(model)
    dots = engine.linearize(batch).dots([torch.ones_like(p) for p in model.parameters()])
    assert torch.isfinite(dots).tolist() == [i != 2 for i in range(6)]
    assert_exact(engine, batch_of(6, 5))
