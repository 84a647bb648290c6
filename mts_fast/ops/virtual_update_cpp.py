"""virtual_update by the C++ kernel: schemas, and which tensors go together in one call."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from mts_fast import reference
from mts_fast.ops.cpp import DTYPES, reasons_against_cpp
from mts_fast.ops.memory_layout import lies_like
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


@torch.library.register_fake("mts_fast::virtual_update_sgd")
@torch.library.register_fake("mts_fast::virtual_update_adam")
def _fake(parameters: list[Tensor], *_: object) -> list[Tensor]:
    return [torch.empty_like(p) for p in parameters]


def reasons(tensors: Sequence[Tensor]) -> list[str]:
    """Why the kernel cannot serve these parameters and gradients."""
    found = reasons_against_cpp(tensors)
    other = {str(t.dtype) for t in tensors if t.dtype not in DTYPES}
    if other and tensors[0].dtype in DTYPES:
        found.append(f"its kernel takes float32 or float64, not {', '.join(sorted(other))}")
    return found


def virtual_update(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], states: Sequence[State]
) -> list[Tensor]:
    """theta' of every parameter: one call for all that share their hyper-parameters and count of
    steps. A tensor whose rule has no kernel, or that does not lie in memory like its gradient and
    state, takes the reference.
    """
    together: dict[tuple, list[tuple[int, SGDState | AdamState]]] = defaultdict(list)
    out: list[Tensor | None] = [None] * len(parameters)
    for i, (p, g, state) in enumerate(zip(parameters, gradients, states, strict=True)):
        if isinstance(state, SGDState | AdamState) and _fits(p, g, state):
            together[_key(p, state)].append((i, state))
        else:
            out[i] = reference.virtual_update(p, g, state)
    for members in together.values():
        updates = _call(
            [parameters[i] for i, _ in members],
            [gradients[i] for i, _ in members],
            [state for _, state in members],
        )
        for (i, _), updated in zip(members, updates, strict=True):
            out[i] = updated
    return [t for t in out if t is not None]


def _call(
    parameters: list[Tensor], gradients: list[Tensor], states: Sequence[SGDState | AdamState]
) -> list[Tensor]:
    s = states[0]
    held = [list(column) for column in zip(*map(_state_tensors, states), strict=True)]
    if isinstance(s, SGDState):
        return torch.ops.mts_fast.virtual_update_sgd(
            *(parameters, gradients, held[0] if held else []),
            *(s.lr, s.momentum, s.dampening, s.weight_decay, s.nesterov, s.maximize),
        )
    return torch.ops.mts_fast.virtual_update_adam(
        *(parameters, gradients, *(held or ([], []))),
        *(s.lr, *s.betas, s.eps, s.weight_decay, s.step, s.decoupled, s.maximize),
    )


def _state_tensors(state: SGDState | AdamState) -> list[Tensor]:
    """What the update reads besides parameter and gradient: nothing before the first step."""
    if isinstance(state, SGDState):
        held = [state.buffer if state.momentum else None]
    else:
        held = [state.exp_avg, state.exp_avg_sq]
    return [t for t in held if t is not None]


def _fits(parameter: Tensor, gradient: Tensor, state: SGDState | AdamState) -> bool:
    """Whether the kernel has the rule's options and numbers, and can walk through all tensors side
    by side: of one dtype, in the same order in memory, without gaps."""
    if isinstance(state, AdamState) and state.amsgrad:
        return False
    if any(isinstance(number, Tensor) for number in _numbers(state)):
        return False
    tensors = [parameter, gradient, *_state_tensors(state)]
    return all(t.dtype == parameter.dtype and lies_like(parameter, t) for t in tensors)


def _numbers(state: SGDState | AdamState) -> list[float | Tensor]:
    """All hyper-parameters; those on a device are tensors."""
    if isinstance(state, SGDState):
        return [state.lr, state.momentum, state.dampening, state.weight_decay]
    return [state.lr, *state.betas, state.eps, state.weight_decay, state.step]


def _key(parameter: Tensor, state: SGDState | AdamState) -> tuple:
    """What tensors of one call share."""
    flags = (state.nesterov,) if isinstance(state, SGDState) else (state.decoupled,)
    started = bool(_state_tensors(state))
    return type(state), parameter.dtype, started, *flags, state.maximize, *_numbers(state)
