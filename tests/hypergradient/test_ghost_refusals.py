"""Checkpoints, functions with their own backward and errors: served, or a reason."""

import pytest
import torch
from ghost_engines import EXACT, SequenceFirst, assert_exact, batch_of, engine_of, true_norms
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mts_fast.hypergradient.ghost import Unsupported
from mts_fast.hypergradient.ghost.sample_norms import gradient_norms
from mts_fast.hypergradient.objective import LabelledBatch
from mts_fast.hypergradient.refused import Refused


class Checkpointed(nn.Module):
    """A checkpointed body behind a frozen layer, as Hugging Face's enable_input_require_grads."""

    def __init__(self, *, reentrant):
        super().__init__()
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.body, self.head, self.reentrant = nn.Linear(5, 8), nn.Linear(8, 3), reentrant

    def forward(self, x):
        h = self.frozen(x).requires_grad_()
        return self.head(checkpoint(self.body, h, use_reentrant=self.reentrant).tanh())


def test_reentrant_checkpoints_are_final():
    engine = engine_of(Checkpointed(reentrant=True).double())
    with pytest.raises(Refused, match=r"model must be .* re-entrant .*use_reentrant=False") as seen:
        engine.linearize(batch_of(6, 5))
    assert seen.value.final
    assert_exact(engine_of(Checkpointed(reentrant=False).double()), batch_of(6, 5))


def test_a_checkpoint_that_hides_no_parameter_but_stops_gradients_is_final():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(checkpoint(torch.tanh, self.first(x), use_reentrant=True))

    with pytest.raises(
        Refused, match=r"model must be differentiable by torch\.autograd\.grad"
    ) as seen:
        engine_of(Model().double()).linearize(batch_of(6, 5))
    assert seen.value.final


class Momentum(nn.Module):
    """Targets from the model's own weights under no_grad, there also checkpointed."""

    def __init__(self, *, checkpointed):
        super().__init__()
        self.body, self.head, self.checkpointed = nn.Linear(5, 8), nn.Linear(8, 3), checkpointed

    def forward(self, x):
        with torch.no_grad():
            target = self.body(x)
            if self.checkpointed:
                x = x.clone().requires_grad_()
                target = checkpoint(self.body, x, use_reentrant=True)
        return self.head(self.body(x) - target.tanh()) + F.linear(x, self.body.weight.detach()[:3])


def test_uses_without_gradient_are_served():
    assert_exact(engine_of(Momentum(checkpointed=False).double()), batch_of(6, 5))


def test_a_checkpoint_without_gradient_is_refused_but_not_final():
    with pytest.raises(Unsupported, match="used inside CheckpointFunction") as seen:
        engine_of(Momentum(checkpointed=True).double()).linearize(batch_of(6, 5))
    assert not seen.value.final


def test_a_function_with_its_own_backward_is_named():
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x, weight)
            return x @ weight.T

        @staticmethod
        def backward(ctx, b):
            x, weight = ctx.saved_tensors
            return b @ weight, b.T @ x

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.weight = nn.Linear(5, 5), nn.Parameter(torch.randn(3, 5))

        def forward(self, x):
            return Product.apply(self.body(x), self.weight)

    engine = engine_of(Model().double())
    assert_exact(engine, batch_of(6, 5))
    assert list(engine.left.values()) == ["weight is used inside Product"]


def test_errors_of_the_models_own_forward_pass_through():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 3)

        def forward(self, x):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        engine_of(Broken()).linearize(batch_of(6, 5))


def test_a_model_for_one_batch_size_is_served():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.layer(x).view(20, 2, 4).tanh().flatten(1))

    assert_exact(engine_of(Fixed().double()), batch_of(20, 5))


def test_sparse_inputs_are_a_reason():
    batch = LabelledBatch(torch.eye(5).double().to_sparse(), torch.arange(5) % 3)
    model = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 3)).double()
    with pytest.raises(Unsupported, match=r"0.weight: the input of its linear is not a dense"):
        engine_of(model).linearize(batch)


def test_losses_without_gradient_are_a_reason():
    model = nn.Linear(5, 3).double()
    with torch.no_grad(), pytest.raises(Unsupported, match="depend on no parameter"):
        engine_of(model).linearize(batch_of(6, 5))


def test_a_backward_that_fails_is_a_reason():
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, b):
            raise NotImplementedError("no derivative")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Linear(5, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.head(Fails.apply(self.first(x)))

    with pytest.raises(Unsupported, match="NotImplementedError: no derivative") as seen:
        engine_of(Model().double()).linearize(batch_of(6, 5))
    assert not seen.value.final


def test_gradient_norms_along_the_right_axis():
    model = SequenceFirst().double()
    engine = engine_of(model)
    for size in (1, 8, 8):
        batch = batch_of(size, 16, 5)
        truth = true_norms(engine, batch)
        torch.testing.assert_close(gradient_norms(engine, batch), truth, rtol=EXACT, atol=EXACT)
