"""Layers whose gradient is not the derivative of their forward, or that mix samples."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worlds.layer import Context, Layer
from worlds.world import WIDTH


class Ternary(torch.autograd.Function):
    """Weights to -1, 0 and 1 times their mean size; the gradient passes straight through."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        scale = weight.abs().mean()
        return (weight / scale).round().clamp(-1, 1) * scale

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class TernaryLinear(Layer):
    """Quantised weights with a straight-through estimator."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 2)

    def run(self, x: Tensor) -> Tensor:
        return F.linear(x, Ternary.apply(self.weight)) + x


class Reversal(torch.autograd.Function):
    """Gradient reversal."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return -0.5 * g


class Domain(Layer):
    """A branch whose gradient is turned round on the way back."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def run(self, x: Tensor) -> Tensor:
        return x + self.inner(Reversal.apply(x)).tanh()


class Detached(Layer):
    """A branch that sends no gradient further down."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def run(self, x: Tensor) -> Tensor:
        return x + self.inner(x.detach()).tanh()


class Mixup(Layer):
    """Half the time, hidden features are mixed with those of other samples."""

    def forward(self, x: Tensor, context: Context) -> Tensor:
        if not self.training or torch.rand(1).item() < 0.5:
            return x
        axis = context.batch_axis if x.ndim == 3 else 0
        order = torch.randperm(x.shape[axis])
        return 0.7 * x + 0.3 * x.index_select(axis, order.to(x.device))


class BatchCentred(Layer):
    """Off with the mean over the batch, while training."""

    def forward(self, x: Tensor, context: Context) -> Tensor:
        axis = context.batch_axis if x.ndim == 3 else 0
        return x - x.mean(axis, keepdim=True) if self.training else x


class RunningCentre(Layer):
    """Off with a running mean, which a training forward moves: in place, or by a new tensor."""

    def __init__(self, reassigned: bool) -> None:
        super().__init__()
        self.reassigned = reassigned
        self.register_buffer("centre", torch.zeros(WIDTH))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def run(self, x: Tensor) -> Tensor:
        y = x - self.centre.clone()
        if self.training:
            mean = x.detach().flatten(0, -2).mean(0).to(self.centre.dtype)
            if self.reassigned:
                self.centre = 0.9 * self.centre + 0.1 * mean
            else:
                self.centre.mul_(0.9).add_(mean, alpha=0.1)
            self.count += 1
        return y
