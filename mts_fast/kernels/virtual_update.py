"""theta' and kappa v of many parameters: a launch for each optimizer, dtypes and alignment."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from mts_fast._triton import accumulator, launch
from mts_fast.kernels.arithmetic import TRITON_DTYPE
from mts_fast.kernels.pointer_table import (
    BLOCK,
    BLOCKS,
    WARPS,
    Kind,
    kind_of,
    places,
    pointer_table,
)
from mts_fast.kernels.virtual_update_rules import adam_kernel, sgd_kernel
from mts_fast.reference.update_rules import (
    AdamState,
    SGDState,
    largest_gradient,
    noise_share,
)

# columns of the numbers that may be tensors on the device
LR, KAPPA_LR = 0, 1
BETAS, CORRECTIONS = slice(5, 7), slice(8, 10)
FLOOR = 10

# the rules that there are kernels of
Known = SGDState | AdamState


def virtual_update(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    states: Sequence[Known],
    *,
    update: bool = True,
    along: Sequence[Tensor] | None = None,
    hypergradient_lr: float | None = None,
    largest: Tensor | None = None,
) -> tuple[list[Tensor] | None, list[Tensor] | None]:
    """(theta' where asked for by `update`, kappa * along where given), in the parameters' dtype.

    All tensors of a parameter are dense, lie alike in memory and are on one device, that of all
    parameters. lr and the steps taken may be tensors on it, and are then not waited for; `largest`
    [] is `largest_gradient` of the whole call, by default of these gradients.
    """
    if along is not None and largest is None:
        largest = largest_gradient(gradients)
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
    for (family, kind, on_device), members in together.items():
        _launch(
            sgd_kernel if family is SGDState else adam_kernel,
            kind,
            [rows[i] for i in members],
            [states[i] for i in members],
            on_device,
            hypergradient_lr,
            largest,
            {"UPDATE": update, "DIRECTION": along is not None},
        )
    return updated, direction


def state_tensors(state: Known) -> tuple[Tensor | None, ...]:
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
    states: list[Known],
    on_device: Sequence[bool],  # whether lr is a tensor there, whether the steps taken are
    hypergradient_lr: float | None,
    largest: Tensor | None,
    switches: dict[str, bool],
) -> None:
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
    where = places(rows)
    if kernel is adam_kernel and largest is not None:
        numbers[:, FLOOR] = noise_share(gradient) * largest.to(table.device)
    launch(
        kernel,
        (len(where),),
        *(where, table, numbers),
        WIDTH=table.shape[1],
        ALIGNED=kind.aligned,
        **switches,
        PARAMETER=TRITON_DTYPE[parameter],
        GRADIENT=TRITON_DTYPE[gradient],
        ALONG=TRITON_DTYPE[along],
        STATE=TRITON_DTYPE[state],
        ACC=TRITON_DTYPE[accumulator(parameter)],
        BLOCK=BLOCK,
        BLOCKS=BLOCKS,
        num_warps=WARPS,
    )


def _numbers(
    state: Known, hypergradient_lr: float | None, on_device: Sequence[bool]
) -> tuple[float, ...]:
    """A row's numbers in the order of its kernel; those that are on the device are 0 here."""
    lr = 0.0 if on_device[0] else float(state.lr)
    sign = -1.0 if state.maximize else 1.0
    shared = lr, lr if hypergradient_lr is None else float(hypergradient_lr), sign
    weight_decay = float(state.weight_decay)
    if isinstance(state, SGDState):
        return *shared, weight_decay, *_sgd_shares(state)
    added, decoupled = (0.0, weight_decay) if state.decoupled else (weight_decay, 0.0)
    steps = 0.0 if on_device[1] else float(state.step) + 1
    betas = [float(beta) for beta in state.betas]
    corrections = [1 - beta**steps for beta in betas]
    noise_floor = 0.0  # always on the device
    return *shared, added, decoupled, *betas, float(state.eps), *corrections, noise_floor


def _sgd_shares(state: SGDState) -> tuple[float, float]:
    """How much of the gradient and of the old buffer is in the step."""
    momentum = float(state.momentum)
    if not momentum:
        return 1.0, 0.0
    # the first step fills the buffer without dampening
    fresh, old = (1.0, 0.0) if state.buffer is None else (1 - float(state.dampening), momentum)
    if state.nesterov:
        return 1 + momentum * fresh, momentum * old
    return fresh, old


def _on(device: torch.device, value: float | Tensor | None) -> bool:
    return isinstance(value, Tensor) and value.device == device
