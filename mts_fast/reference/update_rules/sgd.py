"""torch.optim.SGD."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

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
from mts_fast.reference.update_rules.states import LiveStates, StateColumns


@dataclass(frozen=True)
class SGDState(ElementwiseState):
    """Hyper-parameters of torch.optim.SGD and the live momentum buffer of one tensor."""

    tensors: ClassVar = ("buffer",)
    lr: Number
    momentum: Number = 0.0
    dampening: Number = 0.0
    nesterov: bool = False
    weight_decay: Number = 0.0
    maximize: bool = False
    buffer: Tensor | None = None  # None before the first step

    has_second_moment = False

    def updated(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        step = effective_gradient(parameter, gradient, self.weight_decay, self.maximize)
        if self.momentum:
            if self.buffer is None:
                buffer = step
            else:
                buffer = self.momentum * self.buffer + (1 - self.dampening) * step
            step = step + self.momentum * buffer if self.nesterov else buffer
        return parameter - self.lr * step

    def scalar_kappa(self, lr: Number) -> Number:
        """lr times the factor of the first step, dampening and nesterov."""
        return lr * (-1.0 if self.maximize else 1.0) * self._gain()

    def slope(self, parameter: Tensor, gradient: Tensor, lr: Number) -> tuple[Tensor, None]:
        """A scalar."""
        factor = self.scalar_kappa(lr)
        if isinstance(factor, Tensor):
            return factor.to(parameter), None
        # filled on its device: a copy from the host would wait for it
        return parameter.new_full((), factor), None

    def _gain(self) -> Number:
        """d step/d gradient; the first step fills the buffer without dampening."""
        if not self.momentum:
            return 1.0
        fresh = 1.0 if self.buffer is None else 1 - self.dampening
        return 1 + self.momentum * fresh if self.nesterov else fresh


class SGDRule(ReadRule):
    """torch.optim.SGD: momentum, dampening, nesterov, weight decay, maximize."""

    numbers: ClassVar[Mapping[str, Bounds]] = {
        "lr": NOT_NEGATIVE,
        "momentum": NOT_NEGATIVE,
        "weight_decay": NOT_NEGATIVE,
        "dampening": {},
    }
    optional_state_tensors = ("momentum_buffer",)

    def read(self, group: Options, state: Options) -> SGDState:
        return SGDState(
            lr=number(group["lr"]),
            momentum=number(group["momentum"]),
            dampening=number(group["dampening"]),
            nesterov=bool(group["nesterov"]),
            weight_decay=number(group["weight_decay"]),
            maximize=bool(group["maximize"]),
            buffer=state.get("momentum_buffer"),
        )

    def read_all(self, group: Options, states: LiveStates) -> StateColumns:
        base = self.read(group, {})
        return StateColumns(base, len(states), {"buffer": states.column("momentum_buffer")}, {})
