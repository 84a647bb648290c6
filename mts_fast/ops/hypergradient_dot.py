"""hypergradient_dot and sample_dot: row 6 of one layer; contract, validation and dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from mts_fast import reference
from mts_fast._check import check_device, check_floating, check_length, fail
from mts_fast.backends.registry import register, register_triton, resolve
from mts_fast.backends.triton import hypergradient_dot as triton
from mts_fast.backends.triton.eligibility import reasons_against_triton

DOT, SAMPLE_DOT = "hypergradient_dot", "sample_dot"
register(DOT, "reference", reference.hypergradient_dot)
register(SAMPLE_DOT, "reference", reference.sample_dot)
register_triton(DOT, triton.hypergradient_dot, reasons_against_triton)
register_triton(SAMPLE_DOT, triton.sample_dot, reasons_against_triton)


def hypergradient_dot(a: Tensor, v: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Row 6 for one linear layer: replay it with v in place of its weight, and dot with b.

    d_i = sum_t <a_it v^T + bias, b_it>.

    Args:
        a: [B, T, K], the layer's input; floating point.
        v: [N, K], the direction of its weight (kappa v).
        b: [B, T, N], the gradient at its output.
        bias: [N], the direction of its bias.

    Returns:
        d [B], float32 (float64 of float64 b); without derivatives.

    Raises:
        TypeError, ValueError: wrong dtypes or shapes, tensors on several devices.

    Notes:
        The product is made in b's dtype, as the layer makes it under autocast, and accumulated in
        float32 (float64). The Triton kernel takes any strides, so that a 1 x 1 convolution is
        [B, C, H W] transposed, and never writes the replayed output; it is deterministic.

    Source: row 6.

    Example:
        >>> import torch
        >>> from mts_fast.ops import hypergradient_dot
        >>> a, v, b = torch.ones(2, 3, 4), torch.ones(5, 4), torch.ones(2, 3, 5)
        >>> hypergradient_dot(a, v, b).tolist()
        [60.0, 60.0]
    """
    check_floating(DOT, "a", a, ndim=3)
    check_floating(DOT, "v", v, ndim=2)
    check_floating(DOT, "b", b, ndim=3)
    size, positions, inputs = a.shape
    if v.shape[1] != inputs:
        hint = "it has the shape of the layer's weight"
        fail(ValueError, DOT, "v", f"[N, {inputs}] for a of that width", tuple(v.shape), hint)
    if b.shape != (size, positions, len(v)):
        expected = f"of shape {(size, positions, len(v))}"
        hint = "it has the shape of the layer's output"
        fail(ValueError, DOT, "b", expected, tuple(b.shape), hint)
    tensors = [a, v, b]
    if bias is not None:
        check_floating(DOT, "bias", bias, ndim=1)
        check_length(DOT, "bias", bias, len(v))
        tensors.append(bias)
    for name, value in (("v", v), ("b", b), ("bias", bias)):
        if value is not None:
            check_device(DOT, name, value, a.device, "a")
    with torch.no_grad():
        return resolve(DOT, tensors)(a, v, b, bias)


def sample_dot(x: Tensor, y: Tensor) -> Tensor:
    """<x_i, y_i> [B]: products of two tensors [B, ...] summed over each sample.

    float32 (float64 where one is float64); without derivatives. The Triton kernel reads both once
    and writes no products; it serves tensors of one memory layout, sample after sample.

    Raises:
        TypeError, ValueError: wrong dtypes, differing shapes or devices.

    Example:
        >>> import torch
        >>> from mts_fast.ops import sample_dot
        >>> sample_dot(torch.ones(2, 3), torch.ones(2, 3)).tolist()
        [3.0, 3.0]
    """
    check_floating(SAMPLE_DOT, "x", x)
    check_floating(SAMPLE_DOT, "y", y)
    if x.ndim == 0 or x.shape != y.shape:
        expected = f"of x's shape {tuple(x.shape)}, with samples first"
        fail(ValueError, SAMPLE_DOT, "y", expected, tuple(y.shape), "flatten both alike")
    check_device(SAMPLE_DOT, "y", y, x.device, "x")
    with torch.no_grad():
        return resolve(SAMPLE_DOT, [x, y])(x, y)
