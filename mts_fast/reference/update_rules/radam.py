"""torch.optim.RAdam."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mts_fast.reference.update_rules.adam import correction
from mts_fast.reference.update_rules.ratio import Moment, ratio_slope
from mts_fast.reference.update_rules.rule import (
    NOT_NEGATIVE,
    SHARE,
    Bounds,
    ElementwiseState,
    Number,
    Options,
    ReadRule,
    effective_gradient,
    number,
)

# the length of the running mean above which RAdam divides by the second moment
SHORTEST = 5.0


@dataclass(frozen=True)
class RAdamState(ElementwiseState):
    """Hyper-parameters of torch.optim.RAdam and the live moments of one tensor."""

    tensors: ClassVar = ("exp_avg", "exp_avg_sq")
    lr: Number
    betas: tuple[Number, Number] = (0.9, 0.999)
    eps: Number = 1e-8
    weight_decay: Number = 0.0
    decoupled: bool = False
    maximize: bool = False
    exp_avg: Tensor | None = None  # None before the first step
    exp_avg_sq: Tensor | None = None
    step: Number = 0.0  # steps taken so far

    def updated(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        g = self._effective(parameter, gradient)
        mean, square = self._moments()
        rectified, factor = self._rectification()
        if self.decoupled:
            parameter = parameter * (1 - self.lr * self.weight_decay)
        divided = factor * mean(g) / (square(g * g).sqrt() + self.eps)
        return parameter - self.lr * _chosen(rectified, divided, mean(g))

    def slope(self, parameter: Tensor, gradient: Tensor, lr: Number) -> tuple[Tensor, Tensor]:
        g = self._effective(parameter, gradient)
        mean, square = self._moments()
        rectified, factor = self._rectification()
        root = square(g * g).sqrt()
        slope = _chosen(
            rectified,
            factor * ratio_slope(g, root, self.eps, mean, square),
            torch.ones_like(root) * mean.fresh,
        )
        # torch divides by the uncorrected mean; the noise mask compares the corrected one, and
        # masks nothing where nothing is divided
        size = root / correction(self.betas[1], self.step) ** 0.5
        size = _chosen(rectified, size, torch.full_like(root, math.inf))
        return (-lr if self.maximize else lr) * slope, size

    def _effective(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        decay = 0.0 if self.decoupled else self.weight_decay
        return effective_gradient(parameter, gradient, decay, self.maximize)

    def _moments(self) -> tuple[Moment, Moment]:
        """The bias-corrected mean of the gradient, and the uncorrected mean of its square."""
        beta1, beta2 = self.betas
        first = correction(beta1, self.step)
        return (
            Moment((1 - beta1) / first, beta1 / first, self.exp_avg),
            Moment(1 - beta2, beta2, self.exp_avg_sq),
        )

    def _rectification(self) -> tuple[bool | Tensor, Number]:
        """Whether the running mean of squares is long enough to be divided by, and the factor of
        the divided step: the variance's rectification and the root of the bias correction."""
        beta2 = self.betas[1]
        step = (self.step.double() if isinstance(self.step, Tensor) else self.step) + 1
        second = correction(beta2, self.step)
        longest = 2 / (1 - beta2) - 1
        length = longest - 2 * step * beta2**step / second
        rectified = length > SHORTEST
        if rectified is False:
            return False, 1.0
        share = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
        factor = (share * second) ** 0.5
        if isinstance(rectified, Tensor):
            # an unused root may be NaN, which would reach a derivative
            factor = torch.where(rectified, factor, 1.0)
        return rectified, factor


def _chosen(rectified: bool | Tensor, divided: Tensor, plain: Tensor) -> Tensor:
    if isinstance(rectified, Tensor):
        return torch.where(rectified, divided, plain)
    return divided if rectified else plain


class RAdamRule(ReadRule):
    """torch.optim.RAdam: weight decay of both kinds, maximize."""

    numbers: ClassVar[Mapping[str, Bounds]] = {
        "lr": NOT_NEGATIVE,
        "betas": SHARE,
        "eps": NOT_NEGATIVE,
        "weight_decay": NOT_NEGATIVE,
    }
    state_numbers = ("step",)

    def state_tensors(self, group: Options) -> tuple[str, ...]:
        return "exp_avg", "exp_avg_sq"

    def read(self, group: Options, state: Options) -> RAdamState:
        beta1, beta2 = map(number, group["betas"])
        return RAdamState(
            lr=number(group["lr"]),
            betas=(beta1, beta2),
            eps=number(group["eps"]),
            weight_decay=number(group["weight_decay"]),
            decoupled=bool(group["decoupled_weight_decay"]),
            maximize=bool(group["maximize"]),
            exp_avg=state.get("exp_avg"),
            exp_avg_sq=state.get("exp_avg_sq"),
            step=number(state.get("step", 0.0)),
        )
