"""Every sample's gradients of norms by the Triton kernels: schemas and fake kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from mts_fast import reference
from mts_fast.backends.triton.eligibility import accumulator

torch.library.define(
    "mts_fast::layer_norm_sample_gradients_triton",
    "(Tensor x, Tensor b, float eps, bool centered, bool bias) -> Tensor",
)
torch.library.define(
    "mts_fast::group_norm_sample_gradients_triton",
    "(Tensor x, Tensor b, int groups, float eps, Tensor? mean, Tensor? variance) -> Tensor",
)


@torch.library.impl("mts_fast::layer_norm_sample_gradients_triton", ("cpu", "cuda"))
def _layer_norm(x: Tensor, b: Tensor, eps: float, centered: bool, bias: bool) -> Tensor:
    from mts_fast.backends.triton.kernels import norm_sample_gradients as kernel

    if not kernel.offsets_fit_int32(x, b):
        x, b = x.contiguous(), b.contiguous()
    return kernel.layer_norm_sample_gradients(x, b, eps, centered, bias)


@torch.library.impl("mts_fast::group_norm_sample_gradients_triton", ("cpu", "cuda"))
def _group_norm(
    x: Tensor, b: Tensor, groups: int, eps: float, mean: Tensor | None, variance: Tensor | None
) -> Tensor:
    from mts_fast.backends.triton.kernels import norm_sample_gradients as kernel

    if not kernel.offsets_fit_int32(x, b):
        x, b = x.contiguous(), b.contiguous()
    return kernel.group_norm_sample_gradients(x, b, groups, eps, mean, variance)


@torch.library.register_fake("mts_fast::layer_norm_sample_gradients_triton")
def _fake_layer_norm(x: Tensor, b: Tensor, eps: float, centered: bool, bias: bool) -> Tensor:
    return _new(x, b, 2 if bias else 1, len(x), x.shape[2])


@torch.library.register_fake("mts_fast::group_norm_sample_gradients_triton")
def _fake_group_norm(x: Tensor, b: Tensor, *_: object) -> Tensor:
    return _new(x, b, 2, *x.shape[:2])


def _new(x: Tensor, b: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=accumulator(torch.promote_types(x.dtype, b.dtype)))


def layer_norm_sample_gradients(
    x: Tensor, b: Tensor, eps: float, centered: bool = True, bias: bool = True
) -> tuple[Tensor, Tensor | None]:
    """As the reference, which serves rows that do not fit the registers, and tensors without
    entries."""
    from mts_fast.backends.triton.kernels.norm_sample_gradients import longest_row

    longest = longest_row(accumulator(torch.promote_types(x.dtype, b.dtype)))
    if x.shape[2] > longest or not x.numel():
        return reference.layer_norm_sample_gradients(x, b, eps, centered, bias)
    op = torch.ops.mts_fast.layer_norm_sample_gradients_triton
    sums = op(x, b, eps, centered, bias)
    return sums[0], sums[1] if bias else None


def group_norm_sample_gradients(
    x: Tensor,
    b: Tensor,
    groups: int,
    eps: float,
    mean: Tensor | None = None,
    variance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As the reference, which serves tensors without entries."""
    if not x.numel():
        return reference.group_norm_sample_gradients(x, b, groups, eps, mean, variance)
    op = torch.ops.mts_fast.group_norm_sample_gradients_triton
    of_weight, of_bias = op(x, b, groups, eps, mean, variance)
    return of_weight, of_bias
