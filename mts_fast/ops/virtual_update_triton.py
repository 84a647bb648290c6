"""virtual_update and hypergradient_direction by the Triton kernels, and which tensors they take."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mts_fast import reference
from mts_fast._triton import DTYPES, reasons_against_triton
from mts_fast.ops.memory_layout import lies_like
from mts_fast.reference.virtual_update import AdamState, State


def reasons(tensors: Sequence[Tensor]) -> list[str]:
    """Why the kernels cannot serve these parameters, gradients and directions."""
    return reasons_against_triton(tensors, backward=False)


def virtual_update(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], states: Sequence[State]
) -> list[Tensor]:
    """theta' of every parameter, in the parameter's dtype."""
    return _run(parameters, gradients, states, None, None, update=True)[0]


def hypergradient_direction(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    states: Sequence[State],
    along: Sequence[Tensor],
    hypergradient_lr: float | None,
) -> list[Tensor]:
    """kappa * along of every parameter, in the parameter's dtype."""
    return _run(parameters, gradients, states, along, hypergradient_lr, update=False)[1]


def virtual_update_along(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    states: Sequence[State],
    along: Sequence[Tensor],
    hypergradient_lr: float | None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Both, from one read of what both need."""
    return _run(parameters, gradients, states, along, hypergradient_lr, update=True)


def _run(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    states: Sequence[State],
    along: Sequence[Tensor] | None,
    hypergradient_lr: float | None,
    *,
    update: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """(theta', kappa along), each without entries where not asked for.

    One launch for all that share dtypes and alignment. A tensor that does not lie in memory like
    its gradient, state and direction takes the reference, one by one.
    """
    from mts_fast.kernels import virtual_update as kernel

    rows = list(zip(parameters, gradients, states, along or parameters, strict=True))
    fitting = [
        _fits(p, s, [g, v, *kernel.state_tensors(s)]) for p, g, s, v in rows
    ]  # of each parameter
    served = [row for row, fits in zip(rows, fitting, strict=True) if fits]
    updated, direction = kernel.virtual_update(
        [p for p, _, _, _ in served],
        [g for _, g, _, _ in served],
        [s for _, _, s, _ in served],
        update=update,
        along=None if along is None else [v for _, _, _, v in served],
        hypergradient_lr=hypergradient_lr,
    )
    left, right = iter(updated or ()), iter(direction or ())
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for (p, g, s, v), fits in zip(rows, fitting, strict=True):
        if update:
            found[0].append(next(left) if fits else reference.virtual_update(p, g, s))
        if along is not None:
            slow = reference.hypergradient_direction
            found[1].append(next(right) if fits else slow(p, g, s, v, hypergradient_lr))
    return found


def _fits(parameter: Tensor, state: State, others: Sequence[Tensor | None]) -> bool:
    """Whether a kernel can walk through all of a parameter's tensors side by side."""
    given = [t for t in others if t is not None]
    if isinstance(state, AdamState):
        if any(isinstance(beta, Tensor) for beta in state.betas):
            return False
        if len({m.dtype for m in (state.exp_avg, state.exp_avg_sq) if m is not None}) > 1:
            return False
    known = all(t.dtype in DTYPES for t in given)
    return known and all(lies_like(parameter, t) for t in (parameter, *given))
