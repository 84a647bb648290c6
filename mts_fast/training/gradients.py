"""Hands gradients over to parameters, as `zero_grad()` and a backward would have left them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def set_gradients(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
) -> None:
    """Set `.grad` of these parameters, each to memory of its own, and clear that of all others
    that the optimizer holds: it would step whatever has one."""
    taking_part = {id(p) for p in parameters}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in taking_part:
                parameter.grad = None
    shared: set[int] = set()
    for parameter, g in zip(parameters, gradients, strict=True):
        if g is not None and g.layout == torch.strided:
            if g.data_ptr() in shared:
                g = g.clone()  # autograd hands one tensor out twice, and clipping scales in place
            shared.add(g.data_ptr())
        parameter.grad = g
