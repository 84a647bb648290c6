"""Row 6 for one layer: the replayed output of a linear map, dotted with the output gradient."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def hypergradient_dot(a: Tensor, v: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """d_i = sum_t <F.linear(a_it, v, bias), b_it> [B] of a [B, T, K], v [N, K], b [B, T, N]."""
    bias = bias if bias is None else bias.to(b.dtype)
    return sample_dot(F.linear(a.to(b.dtype), v.to(b.dtype), bias), b)


def sample_dot(x: Tensor, y: Tensor) -> Tensor:
    """<x_i, y_i> [B] over all entries of a sample; in float32 at least."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    return (x.to(dtype) * y.to(dtype)).flatten(1).sum(1)
