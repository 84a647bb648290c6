"""hypergradient_dot: contract, torch.library schema, fake kernel and dispatch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mts_fast import reference
from mts_fast._check import check_floating, fail
from mts_fast.ops.cpp import reasons_against_cpp
from mts_fast.ops.registry import register, resolve

OP = "hypergradient_dot"

torch.library.define(f"mts_fast::{OP}", "(Tensor x, Tensor y) -> Tensor")


@torch.library.register_fake(f"mts_fast::{OP}")
def _fake(x: Tensor, y: Tensor) -> Tensor:
    return x.new_empty(x.shape[0])


def _cpp(x: Tensor, y: Tensor) -> Tensor:
    return torch.ops.mts_fast.hypergradient_dot(x.contiguous(), y.contiguous())


register(OP, "reference", reference.hypergradient_dot)
register(OP, "cpp", _cpp, reasons_against_cpp)


def hypergradient_dot(x: Tensor, y: Tensor) -> Tensor:
    """Dot product of every sample's row: sum_j x_ij y_ij, without the products in memory.

    Args:
        x: [B, n], floating point; a layer's replayed output.
        y: [B, n], of x's dtype; its output gradient.

    Returns:
        [B] of x's dtype.

    Raises:
        TypeError, ValueError: other dtypes or shapes.
        RuntimeError: an explicit backend that cannot run.

    Notes:
        C++: sums of 32 products in x's dtype, added up in float64; the same bits for any number of
        threads.

    Source: row 6, one layer's share.

    Example:
        >>> import torch
        >>> from mts_fast.ops import hypergradient_dot
        >>> hypergradient_dot(torch.ones(2, 3), torch.tensor([[1.0, 2, 3], [0, 0, 4]])).tolist()
        [6.0, 4.0]
    """
    check_floating(OP, "x", x, ndim=2)
    check_floating(OP, "y", y)
    if y.shape != x.shape or y.dtype != x.dtype:
        expected = f"{x.dtype} of x's shape {tuple(x.shape)}"
        fail(ValueError, OP, "y", expected, f"{y.dtype} {tuple(y.shape)}")
    return resolve(OP, [x, y])(x, y)


def kernel(x: Tensor, y: Tensor) -> Callable[[Tensor, Tensor], Tensor] | None:
    """What the backend in force has that is faster than the reference, for callers that know their
    tensors and have a way of their own where there is none."""
    found = resolve(OP, [x, y])
    return None if found is reference.hypergradient_dot else found
