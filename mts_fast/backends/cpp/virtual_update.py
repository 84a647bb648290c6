"""virtual_update by the C++ kernel: schemas, and how tensors are grouped into calls."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from mts_fast.backends import flat
from mts_fast.backends.cpp.eligibility import DTYPES, reasons_against_cpp
from mts_fast.backends.eligibility import same_layout
from mts_fast.reference.update_rules.noise import noise_floor
from mts_fast.reference.virtual_update import AdamState, SGDState, State

torch.library.define(
    "mts_fast::virtual_update_sgd",
    "(Tensor[] parameters, Tensor[] gradients, Tensor[] buffers, float lr, float momentum,"
    " float dampening, float weight_decay, bool nesterov, bool maximize) -> Tensor[]",
)
torch.library.define(
    "mts_fast::virtual_update_adam",
    "(Tensor[] parameters, Tensor[] gradients, Tensor[] exp_avg, Tensor[] exp_avg_sq, float lr,"
    " float beta1, float beta2, float eps, float weight_decay, float step, bool decoupled,"
    " bool maximize) -> Tensor[]",
)
torch.library.define(
    "mts_fast::hypergradient_direction_adam",
    "(Tensor[] parameters, Tensor[] gradients, Tensor[] exp_avg, Tensor[] exp_avg_sq,"
    " Tensor[] along, float floor, float lr, float beta1, float beta2, float eps,"
    " float weight_decay, float step, bool decoupled, bool maximize) -> Tensor[]",
)


@torch.library.register_fake("mts_fast::virtual_update_sgd")
@torch.library.register_fake("mts_fast::virtual_update_adam")
def _fake(parameters: list[Tensor], *_: object) -> list[Tensor]:
    return [torch.empty_like(p) for p in parameters]


@torch.library.register_fake("mts_fast::hypergradient_direction_adam")
def _fake_direction(parameters: list[Tensor], *_: object) -> list[Tensor]:
    count = parameters[0].new_empty((), dtype=torch.int64)
    return [*(torch.empty_like(p) for p in parameters), count]


def reasons(tensors: Sequence[Tensor]) -> list[str]:
    """Why the kernel cannot serve these parameters and gradients."""
    reasons = reasons_against_cpp(tensors)
    other = {str(t.dtype) for t in tensors if t.dtype not in DTYPES}
    if other and tensors[0].dtype in DTYPES:
        reasons.append(f"its kernel takes float32 or float64, not {', '.join(sorted(other))}")
    return reasons


def virtual_update(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], states: Sequence[State]
) -> list[Tensor]:
    """theta' of every parameter: one call for all that share their hyper-parameters and count of
    steps. The reference serves tensors whose rule has no kernel, or whose memory layout is not that
    of their gradient and state, small ones side by side.
    """
    rows = list(zip(parameters, gradients, states, strict=True))
    served = [i for i, (p, g, state) in enumerate(rows) if _fits(state, p, g)]
    out = list(parameters)
    others = sorted(set(range(len(rows))).difference(served))
    made = flat.virtual_update(*_select(others, parameters, gradients, states))
    for i, updated in zip(others, made, strict=True):
        out[i] = updated
    for members in _groups(parameters, states, served):
        p, g, state_lists = _columns(members, parameters, gradients, states)
        s = states[members[0]]
        if isinstance(s, SGDState):
            updates = torch.ops.mts_fast.virtual_update_sgd(
                *(p, g, state_lists[0] if state_lists else []),
                *(s.lr, s.momentum, s.dampening, s.weight_decay, s.nesterov, s.maximize),
            )
        else:
            assert isinstance(s, AdamState)
            updates = torch.ops.mts_fast.virtual_update_adam(
                p, g, *(state_lists or ([], [])), s.lr, *_adam_scalars(s)
            )
        for i, updated in zip(members, updates, strict=True):
            out[i] = updated
    return out


def hypergradient_direction(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    states: Sequence[State],
    along: Sequence[Tensor],
    hypergradient_lr: float | None,
    largest: Tensor,
) -> tuple[list[Tensor], list[Tensor]]:
    """(kappa * along, counts of masked entries): Adam's by the kernel, grouped as in
    `virtual_update`. The others, SGD's too, are products of the reference, small ones side by side.
    """
    rows = list(zip(parameters, gradients, states, along, strict=True))
    served = [
        i
        for i, (p, g, state, v) in enumerate(rows)
        if isinstance(state, AdamState) and _fits(state, p, g, v)
    ]
    out: list[Tensor] = list(along)
    others = sorted(set(range(len(rows))).difference(served))
    p, g, rules, v = _select(others, parameters, gradients, states, along)
    made, counts = flat.hypergradient_direction(p, g, rules, v, hypergradient_lr, largest)
    for i, direction in zip(others, made, strict=True):
        out[i] = direction
    for members in _groups(parameters, states, served):
        p, g, state_lists = _columns(members, parameters, gradients, states)
        s = states[members[0]]
        assert isinstance(s, AdamState)
        lr = s.lr if hypergradient_lr is None else hypergradient_lr
        floor = float(noise_floor(g[0].dtype, largest))
        *directions, count = torch.ops.mts_fast.hypergradient_direction_adam(
            *(p, g, *(state_lists or ([], [])), [along[i] for i in members]),
            *(floor, lr, *_adam_scalars(s)),
        )
        counts.append(count)
        for i, direction in zip(members, directions, strict=True):
            out[i] = direction
    return out, counts


def _select(indices: Sequence[int], *columns: Sequence[Any]) -> list[list[Any]]:
    """The entries at these indices of every column."""
    return [[column[i] for i in indices] for column in columns]


def _groups(
    parameters: Sequence[Tensor], states: Sequence[State], served: Sequence[int]
) -> Iterable[list[int]]:
    """Indices of the tensors of each call of a kernel."""
    together: dict[tuple, list[int]] = defaultdict(list)
    for i in served:
        together[_key(parameters[i], states[i])].append(i)
    return together.values()


def _columns(
    members: Sequence[int],
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    states: Sequence[State],
) -> tuple[list[Tensor], list[Tensor], list[list[Tensor]]]:
    """Parameters, gradients and state tensors of a group; a list for each name of the state."""
    by_name = zip(*(_state_tensors(states[i]) for i in members), strict=True)
    return (
        [parameters[i] for i in members],
        [gradients[i] for i in members],
        [list(column) for column in by_name],
    )


def _adam_scalars(s: AdamState) -> tuple:
    """The scalars after lr, in the order of the schemas of Adam's kernels."""
    return (*s.betas, s.eps, s.weight_decay, s.step, s.decoupled, s.maximize)


def _state_tensors(state: State) -> list[Tensor]:
    """The tensors that a rule reads besides parameter and gradient; none before the first step."""
    tensors: list[Tensor | None] = []
    if isinstance(state, SGDState):
        tensors = [state.buffer if state.momentum else None]
    elif isinstance(state, AdamState):
        tensors = [state.exp_avg, state.exp_avg_sq]
    return [t for t in tensors if t is not None]


def _fits(state: State, parameter: Tensor, *others: Tensor) -> bool:
    """Whether a kernel supports the rule with its options and scalars, and all tensors have one
    dtype and one memory layout, so that one loop reads them in the order of memory."""
    if not isinstance(state, SGDState | AdamState):
        return False
    if isinstance(state, AdamState) and state.amsgrad:
        return False
    if any(isinstance(scalar, Tensor) for scalar in _scalars(state)):
        return False
    tensors = [parameter, *others, *_state_tensors(state)]
    return all(t.dtype == parameter.dtype and same_layout(parameter, t) for t in tensors)


def _scalars(state: SGDState | AdamState) -> list[float | Tensor]:
    """All hyper-parameters; those that are on a device are tensors."""
    if isinstance(state, SGDState):
        return [state.lr, state.momentum, state.dampening, state.weight_decay]
    return [state.lr, *state.betas, state.eps, state.weight_decay, state.step]


def _key(parameter: Tensor, state: State) -> tuple:
    """The grouping key: tensors of equal key go in one call."""
    assert isinstance(state, SGDState | AdamState)
    flags = (state.nesterov,) if isinstance(state, SGDState) else (state.decoupled,)
    started = bool(_state_tensors(state))
    return type(state), parameter.dtype, started, *flags, state.maximize, *_scalars(state)
