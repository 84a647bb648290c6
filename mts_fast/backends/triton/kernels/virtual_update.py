"""theta' and kappa v of many parameters: one launch per optimizer, dtypes and alignment."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from mts_fast.backends.triton.eligibility import accumulator
from mts_fast.backends.triton.kernels.arithmetic import TRITON_DTYPE
from mts_fast.backends.triton.kernels.optimizer_kernels import (
    BETA1,
    BETA2,
    CORRECTION1,
    CORRECTION2,
    KAPPA_LR,
    LR,
    NOISE_FLOOR,
    adam_kernel,
    sgd_kernel,
)
from mts_fast.backends.triton.kernels.pointer_table import (
    BLOCK,
    BLOCKS,
    WARPS,
    Rows,
    pointer_table,
    program_map,
    rows_of,
)
from mts_fast.backends.triton.launch import launch
from mts_fast.reference.update_rules import noise_share
from mts_fast.reference.update_rules.rule import Number
from mts_fast.reference.virtual_update import AdamState, SGDState

# states of the rules that have a kernel
KernelState = SGDState | AdamState
# columns of Adam's scalars, per moment
BETAS = slice(BETA1.value, BETA2.value + 1)
CORRECTIONS = slice(CORRECTION1.value, CORRECTION2.value + 1)


def virtual_update(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    states: Sequence[KernelState],
    *,
    update: bool = True,
    along: Sequence[Tensor] | None = None,
    hypergradient_lr: float | None = None,
    largest: Tensor | None = None,
) -> tuple[list[Tensor] | None, list[Tensor] | None, list[Tensor]]:
    """(theta' if `update`, kappa * along unless `along` is None), in the parameters' dtype, and
    counts of the entries whose kappa is masked as noise against `largest` [], max |g| of the call.

    All tensors of a parameter are dense and have one memory layout; all parameters are on one
    device. lr and the steps taken may be tensors on it, and the host does not wait for them.
    """
    updated = [torch.empty_like(p) for p in parameters] if update else None
    direction = None if along is None else [torch.empty_like(p) for p in parameters]
    columns = [parameters, gradients, along, updated, direction]
    counts = []
    for (family, where), members in _by_rule(parameters, states).items():
        everyone = len(members) == len(states)
        chosen = states if everyone else [states[i] for i in members]
        tensors = columns if everyone else [c and [c[i] for i in members] for c in columns]
        for rows in rows_of([*tensors, *zip(*map(state_tensors, chosen), strict=True)]):
            masked = _launch(
                sgd_kernel if family is SGDState else adam_kernel,
                rows,
                [chosen[i] for i in rows.members],
                where,
                hypergradient_lr,
                largest,
                {"UPDATE": update, "DIRECTION": along is not None},
            )
            if family is not SGDState and along is not None:
                counts.append(masked)
    return updated, direction, counts


def _by_rule(
    parameters: Sequence[Tensor], states: Sequence[KernelState]
) -> dict[tuple[type, tuple[bool, ...]], list[int]]:
    """Which parameters have which rule, and whether lr and steps taken are on the device."""
    together: dict[tuple[type, tuple[bool, ...]], list[int]] = defaultdict(list)
    # by the group of the parameter; those that have taken no step count on the host
    known: dict[tuple[int, bool], list[int]] = {}
    for i, state in enumerate(states):
        step = None if isinstance(state, SGDState) else state.step
        group = state.origin, isinstance(step, Tensor)
        members = known.get(group)
        if members is None:
            where = tuple(_is_on(parameters[i].device, value) for value in (state.lr, step))
            members = known[group] = together[type(state), where]
        members.append(i)
    return together


def state_tensors(state: KernelState) -> tuple[Tensor | None, ...]:
    """The tensors that the update reads besides parameter and gradient; None before the first
    step."""
    if isinstance(state, SGDState):
        return (state.buffer if state.momentum else None,)
    if state.exp_avg is None or state.exp_avg_sq is None:
        return None, None
    return state.exp_avg, state.exp_avg_sq


def _launch(
    kernel: triton.JITFunction,
    rows: Rows,
    states: list[KernelState],
    on_device: Sequence[bool],  # of lr, of the steps taken
    hypergradient_lr: float | None,
    largest: Tensor | None,
    switches: dict[str, bool],
) -> Tensor:
    """Launch one kernel over all rows; counts of masked entries [programs]."""
    table, scalars = pointer_table(rows, _scalars_of(states, hypergradient_lr, on_device))
    if on_device[0]:
        lr = torch.stack([s.lr.reshape(()) for s in states if isinstance(s.lr, Tensor)])
        scalars[:, LR.value] = lr
        if hypergradient_lr is None:
            scalars[:, KAPPA_LR.value] = lr
    if on_device[1]:
        before = [s.step for s in states if isinstance(s, AdamState)]
        steps = torch.stack([t.reshape(()) for t in before if isinstance(t, Tensor)]).double() + 1
        scalars[:, CORRECTIONS] = 1 - scalars[:, BETAS] ** steps[:, None]
    parameter, gradient, along, _, _, state, *_ = rows.kind.dtypes
    if largest is not None and kernel is adam_kernel:
        scalars[:, NOISE_FLOOR.value] = noise_share(gradient) * largest.double()
    registers = 2 if accumulator(parameter) == torch.float64 else 1  # per accumulator
    mapping = program_map(rows)
    counts = torch.zeros(len(mapping), dtype=torch.int32, device=mapping.device)
    launch(
        kernel,
        (len(mapping),),
        *(mapping, table, scalars, counts),
        WIDTH=table.shape[1],
        ALIGNED=rows.kind.aligned,
        **switches,
        PARAMETER=TRITON_DTYPE[parameter],
        GRADIENT=TRITON_DTYPE[gradient],
        ALONG=TRITON_DTYPE[along],
        STATE=TRITON_DTYPE[state],
        ACC=TRITON_DTYPE[accumulator(parameter)],
        # float64 takes twice the registers: half the block, twice as many
        BLOCK=BLOCK // registers,
        BLOCKS=BLOCKS * registers,
        num_warps=WARPS,
    )
    return counts


def _scalars_of(
    states: Sequence[KernelState], hypergradient_lr: float | None, on_device: Sequence[bool]
) -> list[tuple[float, ...]]:
    """The scalars of every row; made once for parameters of a group with as many steps."""
    made: dict[tuple[int, Number], tuple[float, ...]] = {}
    rows = []
    for state in states:
        if isinstance(state, SGDState):
            variant: Number = float(state.buffer is None)
        else:
            variant = 0.0 if on_device[1] else state.step
        key = state.origin, variant
        scalars = made.get(key)
        if scalars is None:
            scalars = made[key] = _scalars(state, hypergradient_lr, on_device)
        rows.append(scalars)
    return rows


def _scalars(
    state: KernelState, hypergradient_lr: float | None, on_device: Sequence[bool]
) -> tuple[float, ...]:
    """A row's scalars in the order of its kernel; 0 for those that are set on the device later."""
    lr = 0.0 if on_device[0] else float(state.lr)
    sign = -1.0 if state.maximize else 1.0
    shared = lr, lr if hypergradient_lr is None else float(hypergradient_lr), sign
    if isinstance(state, SGDState):
        return *shared, float(state.weight_decay), *_sgd_shares(state)
    decay, decoupled = (0.0, 1.0) if state.decoupled else (1.0, 0.0)
    steps = 0.0 if on_device[1] else float(state.step) + 1
    return (
        *(*shared, decay * float(state.weight_decay), decoupled * float(state.weight_decay)),
        *map(float, (*state.betas, state.eps)),
        *(1 - float(beta) ** steps for beta in state.betas),
        0.0,  # NOISE_FLOOR, set on the device later
    )


def _sgd_shares(state: SGDState) -> tuple[float, float]:
    """(gradient_share, buffer_share): the step is their combination of gradient and old buffer."""
    if not state.momentum:
        return 1.0, 0.0
    momentum = float(state.momentum)
    # the first step fills the buffer without dampening
    fresh, old = (1.0, 0.0) if state.buffer is None else (1 - float(state.dampening), momentum)
    if state.nesterov:
        return 1 + momentum * fresh, momentum * old
    return fresh, old


def _is_on(device: torch.device, value: float | Tensor | None) -> bool:
    """Whether a hyper-parameter is a tensor on the device."""
    return isinstance(value, Tensor) and value.device == device
