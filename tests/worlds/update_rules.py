"""One step of torch's optimizers as their documentation writes it, for one tensor.

Differentiable in the gradient; state that an optimizer does not have yet is absent from the dict.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

State = dict[str, Any]
# (theta', new state, root of the second moment or None)
Updated = tuple[Tensor, State, Tensor | None]


def updated(parameter: Tensor, g: Tensor, group: dict, state: State, kind: str) -> Updated:
    """theta' and the new state; `kind` is the optimizer's class name."""
    if group.get("maximize"):
        g = -g
    return RULES[kind](parameter, g, group, state)


def _sgd(theta: Tensor, g: Tensor, o: dict, state: State) -> Updated:
    g = g + o["weight_decay"] * theta
    new: State = {}
    if o["momentum"]:
        old = state.get("momentum_buffer")
        buffer = g if old is None else o["momentum"] * old + (1 - o["dampening"]) * g
        new["momentum_buffer"] = buffer
        g = g + o["momentum"] * buffer if o["nesterov"] else buffer
    return theta - o["lr"] * g, new, None


def _root(x: Tensor) -> Tensor:
    """A square root whose derivative at 0 is 0."""
    zero = x == 0
    return torch.where(zero, 1.0, x).sqrt() * ~zero


def _decayed(theta: Tensor, g: Tensor, o: dict, decoupled: bool) -> tuple[Tensor, Tensor]:
    if decoupled:
        return theta * (1 - o["lr"] * o["weight_decay"]), g
    return theta, g + o["weight_decay"] * theta


def _moments(g: Tensor, o: dict, state: State) -> tuple[Tensor, Tensor, float]:
    b1, b2 = o["betas"]
    zero = torch.zeros_like(g)
    m = b1 * state.get("exp_avg", zero) + (1 - b1) * g
    v = b2 * state.get("exp_avg_sq", zero) + (1 - b2) * g * g
    return m, v, float(state.get("step", 0)) + 1


def _adam(theta: Tensor, g: Tensor, o: dict, state: State) -> Updated:
    theta, g = _decayed(theta, g, o, o.get("decoupled_weight_decay", False))
    m, v, t = _moments(g, o, state)
    new = {"exp_avg": m, "exp_avg_sq": v, "step": t}
    b1, b2 = o["betas"]
    top = v
    if o["amsgrad"]:
        top = torch.maximum(state.get("max_exp_avg_sq", torch.zeros_like(v)), v)
        new["max_exp_avg_sq"] = top
    root = _root(top / (1 - b2**t))
    return theta - o["lr"] * (m / (1 - b1**t)) / (root + o["eps"]), new, root


def _nadam(theta: Tensor, g: Tensor, o: dict, state: State) -> Updated:
    theta, g = _decayed(theta, g, o, o["decoupled_weight_decay"])
    m, v, t = _moments(g, o, state)
    b1, b2 = o["betas"]
    now, then = (b1 * (1 - 0.5 * 0.96 ** (k * o["momentum_decay"])) for k in (t, t + 1))
    product = float(state.get("mu_product", 1.0)) * now
    root = _root(v / (1 - b2**t))
    step = then * m / (1 - product * then) + (1 - now) * g / (1 - product)
    new = {"exp_avg": m, "exp_avg_sq": v, "step": t, "mu_product": product}
    return theta - o["lr"] * step / (root + o["eps"]), new, root


def _radam(theta: Tensor, g: Tensor, o: dict, state: State) -> Updated:
    theta, g = _decayed(theta, g, o, o["decoupled_weight_decay"])
    m, v, t = _moments(g, o, state)
    b1, b2 = o["betas"]
    longest = 2 / (1 - b2) - 1
    length = longest - 2 * t * b2**t / (1 - b2**t)
    new = {"exp_avg": m, "exp_avg_sq": v, "step": t}
    mean = m / (1 - b1**t)
    if length <= 5:
        return theta - o["lr"] * mean, new, None
    over = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
    root = _root(v)
    return theta - o["lr"] * mean * (over * (1 - b2**t)) ** 0.5 / (root + o["eps"]), new, root


def _rmsprop(theta: Tensor, g: Tensor, o: dict, state: State) -> Updated:
    g = g + o["weight_decay"] * theta
    zero = torch.zeros_like(g)
    v = o["alpha"] * state.get("square_avg", zero) + (1 - o["alpha"]) * g * g
    new = {"square_avg": v, "step": float(state.get("step", 0)) + 1}
    if o["centered"]:
        mean = o["alpha"] * state.get("grad_avg", zero) + (1 - o["alpha"]) * g
        new["grad_avg"] = mean
        v = v - mean * mean
    root = _root(v)
    step = g / (root + o["eps"])
    if o["momentum"]:
        step = o["momentum"] * state.get("momentum_buffer", zero) + step
        new["momentum_buffer"] = step
    return theta - o["lr"] * step, new, root


RULES: dict[str, Callable[[Tensor, Tensor, dict, State], Updated]] = {
    "SGD": _sgd,
    "Adam": _adam,
    "AdamW": _adam,
    "NAdam": _nadam,
    "RAdam": _radam,
    "RMSprop": _rmsprop,
}
