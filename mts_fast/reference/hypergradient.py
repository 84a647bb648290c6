"""Row 6 and its sum, by plain autograd: the oracle that every engine is tested against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def hypergradient_dots(
    losses: Tensor, parameters: Sequence[Tensor], direction: Sequence[Tensor]
) -> Tensor:
    """d_i = <direction, grad l_i> [B], exact also where samples are coupled.

    Reverse mode twice: J^T u is linear in a dummy cotangent u, so the gradient of
    <J^T u, direction> with respect to u is J direction. `losses` [B] needs its graph.
    """
    u = torch.zeros_like(losses, requires_grad=True)  # [B]
    rows = torch.autograd.grad(losses, parameters, u, create_graph=True, allow_unused=True)
    terms = [(r * t).sum() for r, t in zip(rows, direction, strict=True) if r is not None]
    return torch.autograd.grad(torch.stack(terms).sum(), u, retain_graph=True)[0]


def hypergradient_double_backward(
    val_loss: Tensor, selector_parameters: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """dL_val/dphi by differentiating through the virtual update, as Meta-Weight-Net codes do.

    `val_loss` [] must have been computed at a theta' that kept its graph back to phi.
    """
    gradients = torch.autograd.grad(val_loss, selector_parameters, allow_unused=True)
    return tuple(
        torch.zeros_like(p) if g is None else g
        for g, p in zip(gradients, selector_parameters, strict=True)
    )
