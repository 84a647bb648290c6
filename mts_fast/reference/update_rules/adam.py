"""torch.optim.Adam and AdamW."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

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
from mts_fast.reference.update_rules.states import LiveStates, StateColumns


@dataclass(frozen=True)
class AdamState(ElementwiseState):
    """Hyper-parameters of torch.optim.Adam or AdamW and the live moments of one tensor."""

    tensors: ClassVar = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    counts: ClassVar = ("step",)
    lr: Number
    betas: tuple[Number, Number] = (0.9, 0.999)
    eps: Number = 1e-8
    weight_decay: Number = 0.0
    decoupled: bool = False  # True: AdamW's decay
    maximize: bool = False
    amsgrad: bool = False
    exp_avg: Tensor | None = None  # None before the first step
    exp_avg_sq: Tensor | None = None
    max_exp_avg_sq: Tensor | None = None  # largest second moment, before bias correction
    step: Number = 0.0  # steps taken so far

    def updated(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        g = self._effective(parameter, gradient)
        mean, _ = self._moments()
        root, _ = self._root(g)
        if self.decoupled:
            parameter = parameter * (1 - self.lr * self.weight_decay)
        return parameter - self.lr * mean(g) / (root + self.eps)

    def slope(self, parameter: Tensor, gradient: Tensor, lr: Number) -> tuple[Tensor, Tensor]:
        g = self._effective(parameter, gradient)
        mean, square = self._moments()
        root, fresh = self._root(g)
        slope = ratio_slope(g, root, self.eps, mean, square)
        if fresh is not None:
            # where the older second moment is larger, the root does not depend on g
            slope = torch.where(fresh, slope, mean.fresh / (root + self.eps))
        return (-lr if self.maximize else lr) * slope, root

    def _effective(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        decay = 0.0 if self.decoupled else self.weight_decay
        return effective_gradient(parameter, gradient, decay, self.maximize)

    def _moments(self) -> tuple[Moment, Moment]:
        """Moments of the gradient and of its square, bias-corrected."""
        first, second = (correction(beta, self.step) for beta in self.betas)
        beta1, beta2 = self.betas
        return (
            Moment((1 - beta1) / first, beta1 / first, self.exp_avg),
            Moment((1 - beta2) / second, beta2 / second, self.exp_avg_sq),
        )

    def _root(self, g: Tensor) -> tuple[Tensor, Tensor | None]:
        """Root of the second moment; under amsgrad also a mask of where this step's is larger."""
        _, square = self._moments()
        second = square(g * g)
        if not self.amsgrad or self.max_exp_avg_sq is None:
            return second.sqrt(), None
        older = self.max_exp_avg_sq / correction(self.betas[1], self.step)
        return torch.maximum(older, second).sqrt(), second > older


def correction(beta: Number, before: Number) -> Number:
    """1 - beta^(steps taken + 1), by which a running mean that began at 0 is divided."""
    # a step count in float32 would round beta^step
    steps = (before.double() if isinstance(before, Tensor) else before) + 1
    return 1 - beta**steps


class AdamRule(ReadRule):
    """torch.optim.Adam and AdamW: amsgrad, weight decay of both kinds, maximize.

    Under amsgrad a second moment that is older than this step does not depend on the gradient; at
    a tie of old and new the old one counts.
    """

    numbers: ClassVar[Mapping[str, Bounds]] = {
        "lr": NOT_NEGATIVE,
        "betas": SHARE,
        "eps": NOT_NEGATIVE,
        "weight_decay": NOT_NEGATIVE,
    }
    state_numbers = ("step",)

    def state_tensors(self, group: Options) -> tuple[str, ...]:
        names = ("exp_avg", "exp_avg_sq")
        return (*names, "max_exp_avg_sq") if group.get("amsgrad") else names

    def read(self, group: Options, state: Options) -> AdamState:
        beta1, beta2 = map(number, group["betas"])
        return AdamState(
            lr=number(group["lr"]),
            betas=(beta1, beta2),
            eps=number(group["eps"]),
            weight_decay=number(group["weight_decay"]),
            decoupled=bool(group.get("decoupled_weight_decay", False)),
            maximize=bool(group["maximize"]),
            amsgrad=bool(group.get("amsgrad", False)),
            exp_avg=state.get("exp_avg"),
            exp_avg_sq=state.get("exp_avg_sq"),
            max_exp_avg_sq=state.get("max_exp_avg_sq"),
            step=number(state.get("step", 0.0)),
        )

    def read_all(self, group: Options, states: LiveStates) -> StateColumns:
        base = self.read(group, {})
        tensors = {name: states.column(name) for name in base.tensors}
        return StateColumns(base, len(states), tensors, {"step": states.numbers("step")})
