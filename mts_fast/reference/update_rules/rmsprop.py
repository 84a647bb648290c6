"""torch.optim.RMSprop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mts_fast.reference.update_rules.adam import correction
from mts_fast.reference.update_rules.ratio import Moment, ratio_slope
from mts_fast.reference.update_rules.rule import (
    NOT_NEGATIVE,
    Bounds,
    ElementwiseState,
    Number,
    Options,
    ReadRule,
    effective_gradient,
    number,
)


@dataclass(frozen=True)
class RMSpropState(ElementwiseState):
    """Hyper-parameters of torch.optim.RMSprop and the live means of one tensor."""

    tensors: ClassVar = ("square_avg", "grad_avg", "buffer")
    lr: Number
    alpha: Number = 0.99
    eps: Number = 1e-8
    weight_decay: Number = 0.0
    momentum: Number = 0.0
    centered: bool = False
    maximize: bool = False
    square_avg: Tensor | None = None  # None before the first step
    grad_avg: Tensor | None = None
    buffer: Tensor | None = None
    step: Number = 0.0  # steps taken so far

    def updated(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        g = effective_gradient(parameter, gradient, self.weight_decay, self.maximize)
        step = g / (self._root(g) + self.eps)
        if self.momentum and self.buffer is not None:
            step = self.momentum * self.buffer + step
        return parameter - self.lr * step

    def slope(self, parameter: Tensor, gradient: Tensor, lr: Number) -> tuple[Tensor, Tensor]:
        g = effective_gradient(parameter, gradient, self.weight_decay, self.maximize)
        root, square = self._root(g), self._square()
        if self.centered:
            slope = self._centered_slope(g, root)
        else:
            slope = ratio_slope(g, root, self.eps, Moment(1.0, 0.0, None), square)
        # torch divides by the uncorrected mean; the noise mask compares the corrected one, since
        # that is of the size of the gradients
        size = (square(g * g) / correction(self.alpha, self.step)).sqrt()
        return (-lr if self.maximize else lr) * slope, size.masked_fill(root == 0, 0.0)

    def _square(self) -> Moment:
        return Moment(1 - self.alpha, self.alpha, self.square_avg)

    def _root(self, g: Tensor) -> Tensor:
        """Root of the mean square; centered: of the variance."""
        square = self._square()(g * g)
        if self.centered:
            mean = Moment(1 - self.alpha, self.alpha, self.grad_avg)(g)
            square = square - mean * mean
        return square.sqrt()

    def _centered_slope(self, g: Tensor, root: Tensor) -> Tensor:
        """d/dg of g / (r + eps) with r^2 = v - m^2, v and m the means of g^2 and g.

        r r' = alpha (1 - alpha) (g - m0), so that r^2 - g r r' = alpha (v0 - m0 m).
        """
        rise = torch.ones_like(root) * self.eps
        if self.square_avg is not None and self.grad_avg is not None:
            mean = Moment(1 - self.alpha, self.alpha, self.grad_avg)(g)
            old = self.alpha * (self.square_avg - self.grad_avg * mean)
            rise = rise + old / root.masked_fill(root == 0, 1.0)
        return rise / (root + self.eps) ** 2


class RMSpropRule(ReadRule):
    """torch.optim.RMSprop: centered, momentum, weight decay, maximize."""

    numbers: ClassVar[Mapping[str, Bounds]] = {
        "lr": NOT_NEGATIVE,
        "alpha": NOT_NEGATIVE,
        "eps": NOT_NEGATIVE,
        "weight_decay": NOT_NEGATIVE,
        "momentum": NOT_NEGATIVE,
    }
    state_numbers = ("step",)

    def state_tensors(self, group: Options) -> tuple[str, ...]:
        names = ["square_avg"]
        if group["momentum"]:
            names.append("momentum_buffer")
        if group["centered"]:
            names.append("grad_avg")
        return tuple(names)

    def read(self, group: Options, state: Options) -> RMSpropState:
        return RMSpropState(
            lr=number(group["lr"]),
            alpha=number(group["alpha"]),
            eps=number(group["eps"]),
            weight_decay=number(group["weight_decay"]),
            momentum=number(group["momentum"]),
            centered=bool(group["centered"]),
            maximize=bool(group["maximize"]),
            square_avg=state.get("square_avg"),
            grad_avg=state.get("grad_avg"),
            buffer=state.get("momentum_buffer"),
            step=number(state.get("step", 0.0)),
        )
