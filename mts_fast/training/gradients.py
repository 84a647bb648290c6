"""Hands gradients over to parameters, as a backward would have left them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def set_gradients(parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """Set every `.grad`, each to memory of its own."""
    taken: set[int] = set()
    for parameter, g in zip(parameters, gradients, strict=True):
        if g is not None and g.data_ptr() in taken:
            g = g.clone()  # autograd hands one tensor out twice, and clipping scales in place
        parameter.grad = g
        if g is not None:
            taken.add(g.data_ptr())
