"""virtual_update and hypergradient_direction by Triton, and which tensors the kernels serve."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mts_fast import reference
from mts_fast.backends.eligibility import same_layout
from mts_fast.backends.triton.eligibility import DTYPES, reasons_against_triton
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
    """(theta', kappa * along, counts of masked entries); parameters and gradients are read once."""
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
    """(theta', kappa along, counts of the entries whose kappa is masked); a list that was not asked
    for is empty.

    One launch for all tensors that share dtypes and alignment. The reference serves tensors whose
    rule has no kernel, or whose memory layout is not that of their gradient, state and direction.
    """
    from mts_fast.backends.triton.kernels import virtual_update as kernel

    rows = list(zip(parameters, gradients, states, along or parameters, strict=True))
    fitting = [_fits(p, g, s, v) for p, g, s, v in rows]
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
    kernel_updated, kernel_direction = iter(updated or ()), iter(direction or ())
    results: tuple[list[Tensor], list[Tensor]] = ([], [])
    for (p, g, s, v), fits in zip(rows, fitting, strict=True):
        if update:
            results[0].append(next(kernel_updated) if fits else reference.virtual_update(p, g, s))
        if along is not None and fits:
            results[1].append(next(kernel_direction))
        elif along is not None:
            scaled, noise = masked_direction(p, g, s, v, hypergradient_lr, largest)
            results[1].append(scaled)
            counts += [] if noise is None else [noise.sum()]
    return *results, counts


def _fits(parameter: Tensor, gradient: Tensor, state: State, along: Tensor) -> bool:
    """Whether a kernel supports the rule, and all tensors of a parameter have dtypes of the kernels
    and one memory layout, so that one offset addresses the same entry in each."""
    from mts_fast.backends.triton.kernels.virtual_update import state_tensors

    if not isinstance(state, SGDState | AdamState):
        return False
    # lr and the steps taken may be tensors on the device, the other scalars may not
    scalars: tuple[float | Tensor, ...]
    if isinstance(state, AdamState):
        scalars = (*state.betas, state.eps, state.weight_decay)
        moments = {m.dtype for m in (state.exp_avg, state.exp_avg_sq) if m is not None}
        if state.amsgrad or len(moments) > 1:
            return False
    else:
        scalars = state.momentum, state.dampening, state.weight_decay
    if any(isinstance(scalar, Tensor) for scalar in scalars):
        return False
    tensors = [t for t in (gradient, along, *state_tensors(state)) if t is not None]
    known = all(t.dtype in DTYPES for t in tensors)
    return known and all(same_layout(parameter, t) for t in (parameter, *tensors))
