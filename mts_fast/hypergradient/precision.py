"""In what precision a model runs, and how far a right engine may be off there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SIXTEEN_BIT = (torch.bfloat16, torch.float16)


def autocast_dtype(parameters: Sequence[Tensor]) -> torch.dtype | None:
    """Autocast's dtype of matrix products on the parameters' device; None where it is off."""
    kind = parameters[0].device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def low_precision_autocast(parameters: Sequence[Tensor]) -> bool:
    """Whether autocast to 16 bits is on where the parameters are."""
    return autocast_dtype(parameters) in SIXTEEN_BIT


def is_low_precision(parameters: Sequence[Tensor]) -> bool:
    """Whether the model computes in 16 bits: by autocast or in its parameters."""
    return low_precision_autocast(parameters) or any(p.dtype in SIXTEEN_BIT for p in parameters)
