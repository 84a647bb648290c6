"""Every sample's gradients of norms by the C++ kernels: schemas, fake kernels, where they win."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mts_fast import reference
from mts_fast.backends.cpp.eligibility import DTYPES
from mts_fast.backends.cpp.extension import extension
from mts_fast.backends.eligibility import several_devices
from mts_fast.backends.registry import on_cpu

# positions of a channel from which on the group norm's kernel is faster: 1.9 times torch at 256,
# 1.3 at 144, 1.0 to 1.2 at 64, 0.7 at 16 (1 and 2 threads, AVX-512)
FEWEST_POSITIONS = 128

torch.library.define(
    "mts_fast::layer_norm_sample_gradients",
    "(Tensor x, Tensor b, float eps, bool centered, bool bias) -> (Tensor, Tensor)",
)
torch.library.define(
    "mts_fast::group_norm_sample_gradients",
    "(Tensor x, Tensor b, int groups, float eps, Tensor? mean, Tensor? variance)"
    " -> (Tensor, Tensor)",
)


@torch.library.register_fake("mts_fast::layer_norm_sample_gradients")
def _fake_layer_norm(
    x: Tensor, b: Tensor, eps: float, centered: bool, bias: bool
) -> tuple[Tensor, Tensor]:
    samples, _, channels = x.shape
    return x.new_empty(samples, channels), x.new_empty(samples if bias else 0, channels)


@torch.library.register_fake("mts_fast::group_norm_sample_gradients")
def _fake_group_norm(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[:2]), x.new_empty(x.shape[:2])


def reasons(tensors: Sequence[Tensor]) -> list[str]:
    """Why no kernel can run for these tensors. Those of other dtypes take the reference, so that a
    model with layers in 16 bits can be run on this backend."""
    status = extension()
    return ([] if status.available else [status.reason]) + several_devices(tensors)


def layer_norm_wins(tensors: Sequence[Tensor]) -> bool:
    """Wherever x and b [B, T, C] are contiguous: 1.4 to 4 times as fast as torch."""
    return on_cpu(tensors) and _kernel_takes(tensors) and all(t.is_contiguous() for t in tensors)


def group_norm_wins(tensors: Sequence[Tensor]) -> bool:
    """As the layer norm's, from FEWEST_POSITIONS on."""
    return layer_norm_wins(tensors) and tensors[0].shape[2] >= FEWEST_POSITIONS


def layer_norm_sample_gradients(
    x: Tensor, b: Tensor, eps: float, centered: bool = True, bias: bool = True
) -> tuple[Tensor, Tensor | None]:
    """As the reference, in one pass."""
    if not _kernel_takes([x, b]):
        return reference.layer_norm_sample_gradients(x, b, eps, centered, bias)
    op = torch.ops.mts_fast.layer_norm_sample_gradients
    of_weight, of_bias = op(x.contiguous(), b.contiguous(), eps, centered, bias)
    return of_weight, of_bias if bias else None


def group_norm_sample_gradients(
    x: Tensor,
    b: Tensor,
    groups: int,
    eps: float,
    mean: Tensor | None = None,
    variance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As the reference, in one pass."""
    if not _kernel_takes([x, b]):
        return reference.group_norm_sample_gradients(x, b, groups, eps, mean, variance)
    if mean is not None and variance is not None:
        mean, variance = (t.to(x.dtype).contiguous() for t in (mean, variance))
    op = torch.ops.mts_fast.group_norm_sample_gradients
    return op(x.contiguous(), b.contiguous(), groups, eps, mean, variance)


def _kernel_takes(tensors: Sequence[Tensor]) -> bool:
    """Whether x and b have entries, of one dtype that the kernels compute in."""
    x, b = tensors[:2]
    return x.dtype == b.dtype and x.dtype in DTYPES and x.numel() > 0
