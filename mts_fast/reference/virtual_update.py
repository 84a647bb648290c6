"""Row 4: the virtual update theta' = U(theta, g), out of place, and kappa = -d theta'/d g.

One tensor at a time; `update_rules/` has the rules. Nothing here writes to an optimizer's state;
theta' is differentiable in `gradient`, and kappa is that derivative, 0 where it would multiply
rounding noise (`update_rules/noise.py`).
"""

from __future__ import annotations

from torch import Tensor

from mts_fast._check import fail
from mts_fast.reference.update_rules import (
    AdamState,
    ElementwiseState,
    SGDState,
    State,
    largest_gradient,
)

__all__ = [
    "AdamState",
    "SGDState",
    "State",
    "hypergradient_direction",
    "kappa",
    "masked_direction",
    "virtual_update",
]


def virtual_update(parameter: Tensor, gradient: Tensor, state: State) -> Tensor:
    """theta' of the parameter's shape and dtype, as one step of the real optimizer leaves it."""
    return state.updated(parameter, gradient).to(parameter.dtype)


def kappa(
    parameter: Tensor,
    gradient: Tensor,
    state: State,
    hypergradient_lr: float | None = None,
    largest: Tensor | None = None,
) -> Tensor:
    """kappa = -d theta'/d gradient, elementwise: a scalar tensor for SGD, the diagonal for others.

    `hypergradient_lr` (the paper's pseudo_lr) takes the place of lr, here only. `largest` [] is
    `largest_gradient` of all gradients of the call; by default this is the only one.
    """
    if not isinstance(state, ElementwiseState):
        hint = "ask for hypergradient_direction"
        fail(TypeError, "kappa", "state", "of an elementwise rule", type(state).__name__, hint)
    largest = largest_gradient([gradient]) if largest is None else largest
    return state.kappa(parameter, gradient, largest, hypergradient_lr)[0]


def hypergradient_direction(
    parameter: Tensor,
    gradient: Tensor,
    state: State,
    along: Tensor,
    hypergradient_lr: float | None = None,
    largest: Tensor | None = None,
) -> Tensor:
    """kappa^T along, of the parameter's shape and dtype; arguments as for `kappa`."""
    return masked_direction(parameter, gradient, state, along, hypergradient_lr, largest)[0]


def masked_direction(
    parameter: Tensor,
    gradient: Tensor,
    state: State,
    along: Tensor,
    hypergradient_lr: float | None = None,
    largest: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(kappa^T along, a mask of where kappa was set to 0 as noise; None: nowhere)."""
    largest = largest_gradient([gradient]) if largest is None else largest
    direction, noise = state.direction(parameter, gradient, along, largest, hypergradient_lr)
    return direction.to(parameter.dtype), noise
