"""torch.optim.Muon: the orthogonalised momentum of a matrix."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from mts_fast.reference.update_rules.rule import (
    NOT_NEGATIVE,
    Bounds,
    Number,
    Options,
    UpdateRule,
    number,
)

# torch.optim.Muon's ratio to the root mean square of AdamW's steps
ADAMW_RMS = 0.2


class MuonRule(UpdateRule):
    """torch.optim.Muon: momentum, nesterov, decoupled weight decay, any adjust_lr_fn.

    theta' orthogonalises in bfloat16, as torch does, to a rounding of the sum. kappa v is the exact
    derivative of the same Newton-Schulz iteration in the parameter's dtype (float32 of 16-bit
    ones): the rounded one is piecewise constant. Entries of a matrix mix: kappa is not
    diagonal, and no entry is taken for noise, since the matrix is divided by its norm as a whole.
    """

    numbers: ClassVar[Mapping[str, Bounds]] = {
        "lr": NOT_NEGATIVE,
        "weight_decay": NOT_NEGATIVE,
        "momentum": NOT_NEGATIVE,
        "eps": NOT_NEGATIVE,
        "ns_coefficients": {},
    }
    optional_state_tensors = ("momentum_buffer",)

    def updated(
        self, parameter: Tensor, gradient: Tensor, group: Options, state: Options
    ) -> Tensor:
        decayed = parameter * (1 - number(group["lr"]) * number(group["weight_decay"]))
        matrix = _momentum(gradient, group, state).bfloat16()
        return decayed - _lr(parameter, group) * _orthogonalized(matrix, group).to(parameter.dtype)

    def direction(
        self,
        parameter: Tensor,
        gradient: Tensor,
        group: Options,
        state: Options,
        along: Tensor,
    ) -> Tensor:
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        widened = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in state.items()}
        with torch.enable_grad():
            g = gradient.detach().to(dtype, copy=True).requires_grad_()
            step = _orthogonalized(_momentum(g, group, widened), group)
            (product,) = torch.autograd.grad(
                step, g, along.to(dtype), create_graph=along.requires_grad
            )
        return _lr(parameter, group) * product

    def reasons(self, group: Options, state: Options) -> list[str]:
        matrices = all(p.ndim == 2 for p in group["params"])
        return [] if matrices else ["Muon takes matrices only, and a parameter is none"]


def _momentum(gradient: Tensor, group: Options, state: Options) -> Tensor:
    """The running mean of the gradient, or nesterov's look-ahead; by torch's own operations, since
    the last place of float32 can decide the rounding to bfloat16."""
    buffer = state.get("momentum_buffer")
    momentum = number(group["momentum"])
    buffer = torch.zeros_like(gradient) if buffer is None else buffer
    mean = torch.lerp(buffer, gradient, 1 - momentum)
    return torch.lerp(gradient, mean, momentum) if group["nesterov"] else mean


def _orthogonalized(matrix: Tensor, group: Options) -> Tensor:
    """About U V^T of U S V^T = matrix, by `ns_steps` quintic Newton-Schulz iterations."""
    a, b, c = group["ns_coefficients"]
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=group["eps"])  # the spectral norm is at most 1
    for _ in range(group["ns_steps"]):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def _lr(parameter: Tensor, group: Options) -> Number:
    rows, columns = parameter.shape
    how = group["adjust_lr_fn"]
    if how is None or how == "original":
        return number(group["lr"]) * math.sqrt(max(1, rows / columns))
    if how == "match_rms_adamw":
        return number(group["lr"]) * ADAMW_RMS * math.sqrt(max(rows, columns))
    return number(group["lr"])
