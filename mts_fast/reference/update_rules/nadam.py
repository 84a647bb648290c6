"""torch.optim.NAdam."""

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
    SHARE,
    Bounds,
    ElementwiseState,
    Number,
    Options,
    ReadRule,
    effective_gradient,
    number,
)

# torch's own: mu_t = beta1 (1 - 0.96^(t momentum_decay) / 2)
MOMENTUM_BASE = 0.96


@dataclass(frozen=True)
class NAdamState(ElementwiseState):
    """Hyper-parameters of torch.optim.NAdam and the live moments of one tensor."""

    tensors: ClassVar = ("exp_avg", "exp_avg_sq")
    lr: Number
    betas: tuple[Number, Number] = (0.9, 0.999)
    eps: Number = 1e-8
    weight_decay: Number = 0.0
    momentum_decay: Number = 4e-3
    decoupled: bool = False
    maximize: bool = False
    exp_avg: Tensor | None = None  # None before the first step
    exp_avg_sq: Tensor | None = None
    mu_product: Number | None = None  # product of the mu of all steps taken
    step: Number = 0.0  # steps taken so far

    def updated(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        g = self._effective(parameter, gradient)
        mean, square = self._moments()
        if self.decoupled:
            parameter = parameter * (1 - self.lr * self.weight_decay)
        return parameter - self.lr * mean(g) / (square(g * g).sqrt() + self.eps)

    def slope(self, parameter: Tensor, gradient: Tensor, lr: Number) -> tuple[Tensor, Tensor]:
        g = self._effective(parameter, gradient)
        mean, square = self._moments()
        root = square(g * g).sqrt()
        slope = ratio_slope(g, root, self.eps, mean, square)
        return (-lr if self.maximize else lr) * slope, root

    def _effective(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        decay = 0.0 if self.decoupled else self.weight_decay
        return effective_gradient(parameter, gradient, decay, self.maximize)

    def _moments(self) -> tuple[Moment, Moment]:
        """The numerator of the step (the gradient and the mean of the next step, each with its
        correction), and the bias-corrected mean of the gradient's square."""
        beta1, beta2 = self.betas
        step = (self.step.double() if isinstance(self.step, Tensor) else self.step) + 1
        mu, mu_next = (
            beta1 * (1 - 0.5 * MOMENTUM_BASE ** (t * self.momentum_decay)) for t in (step, step + 1)
        )
        product = self._product(mu)
        now, ahead = (1 - mu) / (1 - product), mu_next / (1 - product * mu_next)
        second = correction(beta2, self.step)
        return (
            Moment(now + ahead * (1 - beta1), ahead * beta1, self.exp_avg),
            Moment((1 - beta2) / second, beta2 / second, self.exp_avg_sq),
        )

    def _product(self, mu: Number) -> Number:
        """The product of all mu, rounded as in torch, which keeps it as a default-dtype tensor."""
        before = torch.as_tensor(1.0 if self.mu_product is None else self.mu_product)
        return number((before * mu).to(before.dtype))


class NAdamRule(ReadRule):
    """torch.optim.NAdam: weight decay of both kinds, maximize."""

    numbers: ClassVar[Mapping[str, Bounds]] = {
        "lr": NOT_NEGATIVE,
        "betas": SHARE,
        "eps": NOT_NEGATIVE,
        "weight_decay": NOT_NEGATIVE,
        "momentum_decay": NOT_NEGATIVE,
    }
    state_numbers = "step", "mu_product"

    def state_tensors(self, group: Options) -> tuple[str, ...]:
        return "exp_avg", "exp_avg_sq"

    def read(self, group: Options, state: Options) -> NAdamState:
        beta1, beta2 = map(number, group["betas"])
        return NAdamState(
            lr=number(group["lr"]),
            betas=(beta1, beta2),
            eps=number(group["eps"]),
            weight_decay=number(group["weight_decay"]),
            momentum_decay=number(group["momentum_decay"]),
            decoupled=bool(group["decoupled_weight_decay"]),
            maximize=bool(group["maximize"]),
            exp_avg=state.get("exp_avg"),
            exp_avg_sq=state.get("exp_avg_sq"),
            mu_product=state.get("mu_product"),
            step=number(state.get("step", 0.0)),
        )
