"""theta' and kappa v of many parameters: a launch for each optimizer, dtypes and alignment."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from mts_fast.backends.triton.eligibility import accumulator
from mts_fast.backends.triton.launch import launch
from mts_fast.backends.triton.kernels.arithmetic import TRITON_DTYPE
from mts_fast.backends.triton.kernels.pointer_table import (
    BLOCK,
    BLOCKS,
    WARPS,
    Kind,
    kind_of,
    places,
    pointer_table,
)
from mts_fast.backends.triton.kernels.optimizer_kernels import adam_kernel, sgd_kernel
from mts_fast.reference.update_rules import noise_share
from mts_fast.reference.virtual_update import AdamState, SGDState

# the rules that have a kernel
KernelState = SGDState | AdamState
# columns of the numbers that may live on the device
LR, KAPPA_LR = 0, 1
BETAS, CORRECTIONS, NOISE_FLOOR = slice(5, 7), slice(8, 10), 10


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
    """(theta' where asked for by `update`, kappa * along where given), in the parameters' dtype,
    and counts of the entries whose kappa is noise beside `largest` [], max |g| of the whole call.

    All tensors of a parameter are dense, lie alike in memory and are on one device, that of all
    parameters. lr and the steps taken may be tensors on it, and are then not waited for.
    """
    updated = [torch.empty_like(p) for p in parameters] if update else None
    direction = None if along is None else [torch.empty_like(p) for p in parameters]
    together: dict[tuple[type, Kind, tuple[bool, ...]], list[int]] = defaultdict(list)
    absent = [None] * len(parameters)
    rows = [
        (*row, *state_tensors(state))
        for *row, state in zip(
            *(parameters, gradients, along or absent, updated or absent, direction or absent),
            states,
            strict=True,
        )
    ]
    for i, (row, state) in enumerate(zip(rows, states, strict=True)):
        if parameters[i].numel():
            step = None if isinstance(state, SGDState) else state.step
            on_device = tuple(_on(parameters[i].device, value) for value in (state.lr, step))
            together[type(state), kind_of(row), on_device].append(i)
    counts = []
    for (family, kind, on_device), members in together.items():
        masked = _launch(
            sgd_kernel if family is SGDState else adam_kernel,
            kind,
            [rows[i] for i in members],
            [states[i] for i in members],
            on_device,
            hypergradient_lr,
            largest,
            {"UPDATE": update, "DIRECTION": along is not None},
        )
        if family is not SGDState and along is not None:
            counts.append(masked)
    return updated, direction, counts


def state_tensors(state: KernelState) -> tuple[Tensor | None, ...]:
    """What the update reads besides parameter and gradient; None before the first step."""
    if isinstance(state, SGDState):
        return (state.buffer if state.momentum else None,)
    if state.exp_avg is None or state.exp_avg_sq is None:
        return None, None
    return state.exp_avg, state.exp_avg_sq


def _launch(
    kernel: triton.JITFunction,
    kind: Kind,
    rows: list[tuple[Tensor | None, ...]],
    states: list[KernelState],
    on_device: Sequence[bool],  # whether lr is a tensor there, whether the steps taken are
    hypergradient_lr: float | None,
    largest: Tensor | None,
    switches: dict[str, bool],
) -> Tensor:
    """Counts of masked entries [programs]."""
    table, numbers = pointer_table(rows, [_numbers(s, hypergradient_lr, on_device) for s in states])
    if on_device[0]:
        lr = torch.stack([s.lr.reshape(()) for s in states if isinstance(s.lr, Tensor)])
        numbers[:, LR] = lr
        if hypergradient_lr is None:
            numbers[:, KAPPA_LR] = lr
    if on_device[1]:
        taken = [s.step for s in states if isinstance(s, AdamState)]
        steps = torch.stack([t.reshape(()) for t in taken if isinstance(t, Tensor)]).double() + 1
        numbers[:, CORRECTIONS] = 1 - numbers[:, BETAS] ** steps[:, None]
    parameter, gradient, along, _, _, state, *_ = kind.dtypes
    if largest is not None and kernel is adam_kernel:
        numbers[:, NOISE_FLOOR] = noise_share(gradient) * largest.double()
    wide = 2 if accumulator(parameter) == torch.float64 else 1
    where = places(rows)
    counts = torch.zeros(len(where), dtype=torch.int32, device=where.device)
    launch(
        kernel,
        (len(where),),
        *(where, table, numbers, counts),
        WIDTH=table.shape[1],
        ALIGNED=kind.aligned,
        **switches,
        PARAMETER=TRITON_DTYPE[parameter],
        GRADIENT=TRITON_DTYPE[gradient],
        ALONG=TRITON_DTYPE[along],
        STATE=TRITON_DTYPE[state],
        ACC=TRITON_DTYPE[accumulator(parameter)],
        # float64 takes twice the registers: half the tile, twice as often
        BLOCK=BLOCK // wide,
        BLOCKS=BLOCKS * wide,
        num_warps=WARPS,
    )
    return counts


def _numbers(
    state: KernelState, hypergradient_lr: float | None, on_device: Sequence[bool]
) -> tuple[float, ...]:
    """A row's numbers in the order of its kernel; those that live on the device are 0 here."""
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
        0.0,  # the floor of noise, which lives on the device
    )


def _sgd_shares(state: SGDState) -> tuple[float, float]:
    """How much of the gradient and of the old buffer is in the step."""
    if not state.momentum:
        return 1.0, 0.0
    # the first step fills the buffer without dampening
    momentum = float(state.momentum)
    fresh, old = (1.0, 0.0) if state.buffer is None else (1 - float(state.dampening), momentum)
    if state.nesterov:
        return 1 + momentum * fresh, momentum * old
    return fresh, old


def _on(device: torch.device, value: float | Tensor | None) -> bool:
    return isinstance(value, Tensor) and value.device == device
