"""Gradients clipped to a largest norm, as torch.nn.utils.clip_grad_norm_ does, out of place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NORM_EPS = 1e-6  # what torch adds to the norm


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """s = min(1, max_norm / (norm + 1e-6)), []."""
    return (max_norm / (norm + NORM_EPS)).clamp(max=1.0)


def clipped_gradients(gradients: Sequence[Tensor], max_norm: float | None) -> tuple[Tensor, ...]:
    """s g for the gradients of all parameters, differentiable in them; g itself for None."""
    if max_norm is None:
        return tuple(gradients)
    factor = clip_factor(torch.cat([g.flatten() for g in gradients]).norm(), max_norm)
    return tuple(g * factor for g in gradients)
