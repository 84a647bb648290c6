"""Moves of all parameters along a direction, and its length: row 6 by central differences."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm [] of all entries of all tensors together."""
    return torch.stack(torch._foreach_norm(list(tensors))).norm()


def perturb(
    parameters: Sequence[Tensor], direction: Sequence[Tensor], scale: Tensor
) -> list[Tensor]:
    """parameter + scale * direction, in the parameter's dtype; scale is []."""
    return [(p + scale * v).to(p.dtype) for p, v in zip(parameters, direction, strict=True)]
