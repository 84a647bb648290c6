"""hypergradient_dot and sample_dot by the Triton kernels: schemas and fake kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from mts_fast import reference
from mts_fast.backends.eligibility import same_layout
from mts_fast.backends.triton.eligibility import accumulator

torch.library.define(
    "mts_fast::hypergradient_dot", "(Tensor a, Tensor v, Tensor b, Tensor? bias) -> Tensor"
)
torch.library.define("mts_fast::sample_dot", "(Tensor x, Tensor y) -> Tensor")


@torch.library.impl("mts_fast::hypergradient_dot", ("cpu", "cuda"))
def _dot(a: Tensor, v: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    from mts_fast.backends.triton.kernels import hypergradient_dot as kernel

    if not kernel.offsets_fit_int32(a, v, b):
        a, v, b = a.contiguous(), v.contiguous(), b.contiguous()
    return kernel.hypergradient_dot(a, v, b, bias)


@torch.library.impl("mts_fast::sample_dot", ("cpu", "cuda"))
def _sample_dot(x: Tensor, y: Tensor) -> Tensor:
    from mts_fast.backends.triton.kernels import sample_dot as kernel

    return kernel.sample_dot(x, y)


@torch.library.register_fake("mts_fast::hypergradient_dot")
def _fake_dot(a: Tensor, v: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return a.new_empty(len(a), dtype=accumulator(b.dtype))


@torch.library.register_fake("mts_fast::sample_dot")
def _fake_sample_dot(x: Tensor, y: Tensor) -> Tensor:
    return x.new_empty(len(x), dtype=accumulator(torch.promote_types(x.dtype, y.dtype)))


def hypergradient_dot(a: Tensor, v: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """As the reference; the replayed output is never written to memory."""
    return torch.ops.mts_fast.hypergradient_dot(a, v, b, bias)


def sample_dot(x: Tensor, y: Tensor) -> Tensor:
    """As the reference, which serves tensors whose samples have different memory layouts."""
    if _samples_same_layout(x, y):
        return torch.ops.mts_fast.sample_dot(x, y)
    return reference.sample_dot(x, y)


def _samples_same_layout(x: Tensor, y: Tensor) -> bool:
    """Whether both have one memory layout without gaps, in which samples follow one another."""
    outermost = len(x) <= 1 or x.stride(0) == x.shape[1:].numel()
    return outermost and same_layout(x, y)
