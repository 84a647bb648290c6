"""Inputs and output gradients of layers that treat every position alike."""

from __future__ import annotations

from torch import Tensor

from mts_fast.hypergradient.ghost.parts import DensePart, GradientPart
from mts_fast.hypergradient.ghost.sample_axis import SampleAxis


def positions(values: Tensor, axis: SampleAxis, size: int) -> Tensor:
    """[B, T, D] of a layer's input or output gradient [..., D]."""
    return axis.samples(values.detach(), size).reshape(size, -1, values.shape[-1])


def weight_and_bias(weight: GradientPart, b: Tensor) -> dict[str, GradientPart]:
    """The weight's part, and the bias's: b [B, T, R] summed over positions."""
    return {"weight": weight, "bias": DensePart(b.sum(1))}
