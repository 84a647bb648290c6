"""Row 4: the virtual update theta' = U(theta, g), out of place, and kappa = -d theta'/d g.

One tensor at a time. Nothing here writes to an optimizer's state; every function is
differentiable in `gradient`, and kappa is that derivative in closed form.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SGDState:
    """Hyper-parameters of torch.optim.SGD and the live momentum buffer of one tensor."""

    lr: float | Tensor
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    maximize: bool = False
    buffer: Tensor | None = None  # None before the first step


@dataclass(frozen=True)
class AdamState:
    """Hyper-parameters of torch.optim.Adam or AdamW and the live moments of one tensor."""

    lr: float | Tensor
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = False  # True: AdamW's decay
    maximize: bool = False
    exp_avg: Tensor | None = None  # None before the first step
    exp_avg_sq: Tensor | None = None
    step: float | Tensor = 0.0  # steps taken so far


State = SGDState | AdamState


def virtual_update(parameter: Tensor, gradient: Tensor, state: State) -> Tensor:
    """theta' of the parameter's shape and dtype, as one step of the real optimizer leaves it."""
    if isinstance(state, SGDState):
        return _sgd(parameter, gradient, state).to(parameter.dtype)
    return _adam(parameter, gradient, state).to(parameter.dtype)


def kappa(
    parameter: Tensor, gradient: Tensor, state: State, hypergradient_lr: float | None = None
) -> Tensor:
    """kappa = -d theta'/d gradient, elementwise: a scalar tensor for SGD, the diagonal for Adam.

    `hypergradient_lr` (the paper's pseudo_lr) takes the place of lr, here only.
    """
    lr = state.lr if hypergradient_lr is None else hypergradient_lr
    sign = -1.0 if state.maximize else 1.0
    if isinstance(state, SGDState):
        factor = lr * sign * _sgd_gain(state)
        return torch.as_tensor(factor, dtype=parameter.dtype, device=parameter.device)
    return sign * lr * _adam_slope(parameter, gradient, state)


def hypergradient_direction(
    parameter: Tensor,
    gradient: Tensor,
    state: State,
    along: Tensor,
    hypergradient_lr: float | None = None,
) -> Tensor:
    """kappa * along, of the parameter's shape and dtype."""
    return (kappa(parameter, gradient, state, hypergradient_lr) * along).to(parameter.dtype)


def _sgd(parameter: Tensor, gradient: Tensor, state: SGDState) -> Tensor:
    step = _effective_gradient(parameter, gradient, state.weight_decay, state.maximize)
    if state.momentum:
        if state.buffer is None:
            buffer = step
        else:
            buffer = state.momentum * state.buffer + (1 - state.dampening) * step
        step = step + state.momentum * buffer if state.nesterov else buffer
    return parameter - state.lr * step


def _sgd_gain(state: SGDState) -> float:
    """d step/d gradient of one SGD step; the first step fills the buffer without dampening."""
    if not state.momentum:
        return 1.0
    fresh = 1.0 if state.buffer is None else 1 - state.dampening
    return 1 + state.momentum * fresh if state.nesterov else fresh


def _adam(parameter: Tensor, gradient: Tensor, state: AdamState) -> Tensor:
    decay = 0.0 if state.decoupled else state.weight_decay
    g = _effective_gradient(parameter, gradient, decay, state.maximize)
    mean, _, root = _adam_moments(g, state)
    if state.decoupled:
        parameter = parameter * (1 - state.lr * state.weight_decay)
    return parameter - state.lr * mean / (root + state.eps)


def _adam_slope(parameter: Tensor, gradient: Tensor, state: AdamState) -> Tensor:
    """d/dg of m / (r + eps), m and r bias-corrected: (m' r - m r' + m' eps) / (r + eps)^2.

    m' = (1 - beta1)/c1 and r' = (1 - beta2) g/(c2 r). The g^2 of m' r^2 and m r' r cancel, and what
    is left holds the old moments m0 and v0 only: (beta2 (1 - beta1) v0 - beta1 (1 - beta2) m0 g) /
    (c1 c2). Subtracting them in floats would leave noise alone at the first step, of slope
    eps/(r + eps)^2. Where the second moment is exactly 0 no sample ever had a gradient, kappa
    multiplies zeros, and it is set to 0: lr/eps would only drown the other entries of a
    finite-difference direction.
    """
    decay = 0.0 if state.decoupled else state.weight_decay
    g = _effective_gradient(parameter, gradient, decay, state.maximize)
    _, (c1, c2), root = _adam_moments(g, state)
    beta1, beta2 = state.betas
    zero = root == 0
    rise = torch.full_like(root, state.eps) * ((1 - beta1) / c1)
    if state.exp_avg is not None and state.exp_avg_sq is not None:
        old = beta2 * (1 - beta1) * state.exp_avg_sq - beta1 * (1 - beta2) * state.exp_avg * g
        rise = rise + old / (c1 * c2) / root.masked_fill(zero, 1.0)
    return (rise / (root + state.eps) ** 2).masked_fill(zero, 0.0)


def _adam_moments(
    g: Tensor, state: AdamState
) -> tuple[Tensor, tuple[float | Tensor, float | Tensor], Tensor]:
    """Bias-corrected first moment, the two corrections, and the root of the second moment."""
    beta1, beta2 = state.betas
    # float32 would round beta^step
    taken = state.step.double() if isinstance(state.step, Tensor) else state.step
    step = taken + 1
    correction = (1 - beta1**step, 1 - beta2**step)
    mean = (1 - beta1) * g
    square = (1 - beta2) * g * g
    if state.exp_avg is not None and state.exp_avg_sq is not None:
        mean = beta1 * state.exp_avg + mean
        square = beta2 * state.exp_avg_sq + square
    return mean / correction[0], correction, (square / correction[1]).sqrt()


def _effective_gradient(
    parameter: Tensor, gradient: Tensor, weight_decay: float, maximize: bool
) -> Tensor:
    g = -gradient if maximize else gradient
    return g + weight_decay * parameter if weight_decay else g
