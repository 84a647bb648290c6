"""Every sample's gradients of a norm's weight and bias: sums of x^ b and of b over positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def layer_norm_sample_gradients(
    x: Tensor, b: Tensor, eps: float, centered: bool = True, bias: bool = True
) -> tuple[Tensor, Tensor | None]:
    """(sum_t x^_it b_it [B, C], sum_t b_it [B, C]) of x, b [B, T, C]; x^ is the layer norm of x
    over the channels, or its RMS norm where not `centered`; in float32 at least."""
    x, b = _same_dtype(x, b)
    normalize = F.layer_norm if centered else F.rms_norm
    normalized = normalize(x, x.shape[2:], eps=eps)
    return (normalized * b).sum(1), b.sum(1) if bias else None


def group_norm_sample_gradients(
    x: Tensor,
    b: Tensor,
    groups: int,
    eps: float,
    mean: Tensor | None = None,
    variance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(sum_s x^_ics b_ics [B, C], sum_s b_ics [B, C]) of x, b [B, C, S]; x^ is the group norm of x,
    or its batch norm by the mean and variance [C]; in float32 at least."""
    x, b = _same_dtype(x, b)
    if mean is None or variance is None:
        samples, channels, positions = x.shape
        grouped = x.reshape(samples, groups, channels // groups * positions)
        # by layer_norm, as group_norm refuses groups of one entry
        normalized = F.layer_norm(grouped, grouped.shape[2:], eps=eps).reshape(x.shape)
    else:
        normalized = F.batch_norm(x, mean.to(x.dtype), variance.to(x.dtype), eps=eps)
    return (normalized * b).sum(2), b.sum(2)


def _same_dtype(x: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(torch.promote_types(x.dtype, b.dtype), torch.float32)
    return x.to(dtype), b.to(dtype)
