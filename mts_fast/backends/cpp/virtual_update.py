"""virtual_update by the C++ kernel: schemas, and how tensors are grouped into calls."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mts_fast._columns import at, dtypes_of, put
from mts_fast.backends import flat
from mts_fast.backends.alike import alike
from mts_fast.backends.cpp.eligibility import DTYPES, reasons_against_cpp
from mts_fast.backends.eligibility import same_layout
from mts_fast.reference.update_rules.noise import noise_floor
from mts_fast.reference.update_rules.states import samples, states_at
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
    other = {str(dtype) for dtype in dtypes_of(tensors) if dtype not in DTYPES}
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
    out = list(parameters)
    calls, others = _calls(states, parameters, gradients)
    for members, s, (p, g), tensors in calls:
        if isinstance(s, SGDState):
            updates = torch.ops.mts_fast.virtual_update_sgd(
                *(p, g, tensors[0] if tensors else []),
                *(s.lr, s.momentum, s.dampening, s.weight_decay, s.nesterov, s.maximize),
            )
        else:
            updates = torch.ops.mts_fast.virtual_update_adam(
                p, g, *(tensors or ([], [])), s.lr, *_adam_scalars(s)
            )
        put(out, members, updates)
    if others:
        rest = at(parameters, others), at(gradients, others), states_at(states, others)
        put(out, others, flat.virtual_update(*rest))
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
    out: list[Tensor] = list(along)
    kernel_calls: list[_Call] = []
    others = list(range(len(states)))
    if any(isinstance(state, AdamState) for state in samples(states)):
        calls, others = _calls(states, parameters, gradients, along)
        kernel_calls = [call for call in calls if isinstance(call.state, AdamState)]
        plain = [call for call in calls if not isinstance(call.state, AdamState)]
        others = sorted([*others, *(i for call in plain for i in call.members)])
    counts: list[Tensor] = []
    if others:
        rows = at(parameters, others), at(gradients, others), states_at(states, others)
        v = at(along, others)
        made, counts = flat.hypergradient_direction(*rows, v, hypergradient_lr, largest)
        put(out, others, made)
    for members, s, (p, g, v), tensors in kernel_calls:
        lr = s.lr if hypergradient_lr is None else hypergradient_lr
        floor = float(noise_floor(g[0].dtype, largest))
        *directions, count = torch.ops.mts_fast.hypergradient_direction_adam(
            *(p, g, *(tensors or ([], [])), v), *(floor, lr, *_adam_scalars(s))
        )
        counts.append(count)
        put(out, members, directions)
    return out, counts


class _Call(NamedTuple):
    """Parameters of one call of a kernel."""

    members: Sequence[int]
    state: Any  # of the first
    columns: Sequence[Sequence[Tensor]]
    tensors: Sequence[Sequence[Tensor]]  # of the states; none before the first step


def _calls(states: Sequence[State], *columns: Sequence[Tensor]) -> tuple[list[_Call], list[int]]:
    """(calls of kernels, the parameters that they cannot serve)."""
    groups, others = alike(states, *columns)
    calls = []
    for group in groups:
        tensors = [group.tensors[name] for name in _read(group.state) if name in group.tensors]
        dtypes = {column[0].dtype for column in (*group.columns, *tensors)}
        if _has_kernel(group.state) and len(dtypes) == 1:
            calls.append(_Call(group.members, group.state, group.columns, tensors))
        else:
            others += group.members
    fitting = [i for i in others if _fits(states[i], *(column[i] for column in columns))]
    together: dict[tuple, list[int]] = defaultdict(list)
    for i in fitting:
        together[_key(columns[0][i], states[i])].append(i)
    for members in together.values():
        by_name = list(zip(*(_state_tensors(states[i]) for i in members), strict=True))
        selected = [at(column, members) for column in columns]
        calls.append(_Call(members, states[members[0]], selected, list(map(list, by_name))))
    return calls, sorted(set(others).difference(fitting))


def _adam_scalars(s: AdamState) -> tuple:
    """The scalars after lr, in the order of the schemas of Adam's kernels."""
    return (*s.betas, s.eps, s.weight_decay, s.step, s.decoupled, s.maximize)


def _read(state: State | None) -> tuple[str, ...]:
    """Names of the tensors that a kernel reads of a state, where they are there."""
    if isinstance(state, SGDState):
        return ("buffer",) if state.momentum else ()
    return ("exp_avg", "exp_avg_sq") if isinstance(state, AdamState) else ()


def _state_tensors(state: State) -> list[Tensor]:
    """The tensors that a rule reads besides parameter and gradient; none before the first step."""
    return [t for name in _read(state) if (t := getattr(state, name)) is not None]


def _has_kernel(state: State | None) -> bool:
    """Whether a kernel supports the rule with its options and scalars."""
    if not isinstance(state, SGDState | AdamState):
        return False
    if isinstance(state, AdamState) and state.amsgrad:
        return False
    return not any(isinstance(scalar, Tensor) for scalar in _scalars(state))


def _fits(state: State, parameter: Tensor, *others: Tensor) -> bool:
    """Whether a kernel serves the rule, and all tensors have one dtype and one memory layout, so
    that one loop reads them in the order of memory."""
    if not _has_kernel(state):
        return False
    tensors = [parameter, *others, *_state_tensors(state)]
    return all(
        t.dtype == parameter.dtype and same_layout(parameter, t) and not t.is_neg() for t in tensors
    )


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
