"""virtual_update and hypergradient_direction by Triton, and which tensors the kernels serve."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mts_fast import reference
from mts_fast._columns import (
    are_contiguous,
    are_missing,
    are_tensors,
    devices_of,
    dtypes_of,
    sizes_of,
)
from mts_fast.backends.eligibility import same_layout
from mts_fast.backends.triton.eligibility import DTYPES, reasons_against_triton
from mts_fast.reference.virtual_update import AdamState, SGDState, State, masked_direction

FITTING = set(DTYPES)


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
    # by group of the optimizer
    supported = {origin: _has_kernel(s) for origin, s in {s.origin: s for s in states}.items()}
    if all(supported.values()) and _all_fit(parameters, gradients, states, along):
        fitting = [True] * len(rows)
    else:
        fitting = [supported[s.origin] and _fits(p, g, s, v) for p, g, s, v in rows]
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


def _all_fit(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    states: Sequence[State],
    along: Sequence[Tensor] | None,
) -> bool:
    """Whether each parameter fits, in the usual case: everything is contiguous."""
    from mts_fast.backends.triton.kernels.virtual_update import state_tensors

    rules: list[Any] = list(states)
    if len(set(map(type, rules))) > 1:
        return False
    columns: list[Any] = [gradients, *zip(*map(state_tensors, rules), strict=True)]
    present = [c for c in (parameters, along, *columns) if c is not None and not are_missing(c)]
    known = all(are_tensors(column) and dtypes_of(column) <= FITTING for column in present)
    if len(columns) == 3 and known and not are_missing(columns[1]):  # of Adam, of one dtype
        known = len(dtypes_of([*columns[1], *columns[2]])) == 1
    if not known or not all(map(are_contiguous, present)):
        return False
    sizes, devices = sizes_of(parameters), devices_of(parameters)
    # shapes are checked by the op, and those of states by the optimizer's check
    return all(sizes_of(c) == sizes and devices_of(c) == devices for c in present[1:])


def _fits(parameter: Tensor, gradient: Tensor, state: State, along: Tensor) -> bool:
    """Whether all tensors of a parameter have dtypes of the kernels and one memory layout, so that
    one offset addresses the same entry in each; the rule has a kernel (`_has_kernel`)."""
    from mts_fast.backends.triton.kernels.virtual_update import state_tensors

    assert isinstance(state, SGDState | AdamState)
    tensors = (gradient, along, *state_tensors(state))
    if isinstance(state, AdamState):
        first, second = tensors[2:]
        if first is not None and second is not None and first.dtype is not second.dtype:
            return False
    shape, contiguous = parameter.shape, parameter.is_contiguous()
    if not contiguous and not same_layout(parameter, parameter):
        return False
    for t in tensors:
        if t is None or t is parameter:
            continue
        if t.dtype not in DTYPES:
            return False
        alike = contiguous and t.is_contiguous() and t.shape == shape
        if not (alike and t.device == parameter.device) and not same_layout(parameter, t):
            return False
    return parameter.dtype in DTYPES


def _has_kernel(state: State) -> bool:
    """Whether a kernel supports the rule with these options, which all of a group share."""
    # lr and the steps taken may be tensors on the device, the other scalars may not
    scalars: tuple[float | Tensor, ...]
    if isinstance(state, AdamState):
        scalars = (*state.betas, state.eps, state.weight_decay)
        if state.amsgrad:
            return False
    elif isinstance(state, SGDState):
        scalars = state.momentum, state.dampening, state.weight_decay
    else:
        return False
    return not any(isinstance(scalar, Tensor) for scalar in scalars)
