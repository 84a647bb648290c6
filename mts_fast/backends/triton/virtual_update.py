"""virtual_update and hypergradient_direction by the Triton kernels, and which tensors they take."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mts_fast import reference
from mts_fast.backends.triton.eligibility import DTYPES, reasons_against_triton
from mts_fast.backends.eligibility import lies_like
from mts_fast.reference.virtual_update import AdamState, SGDState, State, masked_direction


def reasons(tensors: Sequence[Tensor]) -> list[str]:
    """Why the kernels cannot serve these parameters, gradients and directions."""
    return reasons_against_triton(tensors, backward=False)


def virtual_update(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], states: Sequence[State]
) -> list[Tensor]:
    """theta' of every parameter, in the parameter's dtype."""
    return _run(parameters, gradients, states, None, None, None, update=True)[0]


def hypergradient_direction(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    states: Sequence[State],
    along: Sequence[Tensor],
    hypergradient_lr: float | None,
    largest: Tensor,
) -> tuple[list[Tensor], list[Tensor]]:
    """kappa * along of every parameter, in the parameter's dtype; counts of masked entries."""
    return _run(parameters, gradients, states, along, hypergradient_lr, largest, update=False)[1:]


def virtual_update_along(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    states: Sequence[State],
    along: Sequence[Tensor],
    hypergradient_lr: float | None,
    largest: Tensor,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Both and the counts, from one read of what both need."""
    return _run(parameters, gradients, states, along, hypergradient_lr, largest, update=True)


def _run(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    states: Sequence[State],
    along: Sequence[Tensor] | None,
    hypergradient_lr: float | None,
    largest: Tensor | None,
    *,
    update: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """(theta', kappa along), each without entries where not asked for, and counts of the entries
    whose kappa is masked.

    One launch for all that share dtypes and alignment. A tensor whose rule has no kernel, or that
    does not lie in memory like its gradient, state and direction, takes the reference, one by one.
    """
    from mts_fast.backends.triton.kernels import virtual_update as kernel

    rows = list(zip(parameters, gradients, states, along or parameters, strict=True))
    fitting = [_fits(p, g, s, v) for p, g, s, v in rows]  # of each parameter
    served = [row for row, fits in zip(rows, fitting, strict=True) if fits]
    updated, direction, counts = kernel.virtual_update(
        [p for p, _, _, _ in served],
        [g for _, g, _, _ in served],
        [s for _, _, s, _ in served if isinstance(s, SGDState | AdamState)],
        update=update,
        along=None if along is None else [v for _, _, _, v in served],
        hypergradient_lr=hypergradient_lr,
        largest=largest,
    )
    left, right = iter(updated or ()), iter(direction or ())
    results: tuple[list[Tensor], list[Tensor]] = ([], [])
    for (p, g, s, v), fits in zip(rows, fitting, strict=True):
        if update:
            results[0].append(next(left) if fits else reference.virtual_update(p, g, s))
        if along is not None and fits:
            results[1].append(next(right))
        elif along is not None:
            scaled, noise = masked_direction(p, g, s, v, hypergradient_lr, largest)
            results[1].append(scaled)
            counts += [] if noise is None else [noise.sum()]
    return *results, counts


def _fits(parameter: Tensor, gradient: Tensor, state: State, along: Tensor) -> bool:
    """Whether a kernel knows the rule and can walk through all of a parameter's tensors side by
    side."""
    from mts_fast.backends.triton.kernels.virtual_update import state_tensors

    if not isinstance(state, SGDState | AdamState):
        return False
    # lr and the steps taken may be on the device, other numbers not
    numbers: tuple[float | Tensor, ...]
    if isinstance(state, AdamState):
        numbers = (*state.betas, state.eps, state.weight_decay)
        moments = {m.dtype for m in (state.exp_avg, state.exp_avg_sq) if m is not None}
        if state.amsgrad or len(moments) > 1:
            return False
    else:
        numbers = state.momentum, state.dampening, state.weight_decay
    if any(isinstance(number, Tensor) for number in numbers):
        return False
    tensors = [t for t in (gradient, along, *state_tensors(state)) if t is not None]
    known = all(t.dtype in DTYPES for t in tensors)
    return known and all(lies_like(parameter, t) for t in (parameter, *tensors))
