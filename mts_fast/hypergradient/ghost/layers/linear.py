"""F.linear: y = a W^T + c."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from mts_fast.hypergradient.ghost.layers.positions import positions, weight_and_bias
from mts_fast.hypergradient.ghost.parts import GradientPart, OuterPart
from mts_fast.hypergradient.ghost.rules import LayerCall, Product, register_layer
from mts_fast.hypergradient.ghost.sample_axis import SampleAxis


def _weight_gradient(call: LayerCall, b: Tensor) -> dict[str, Tensor]:
    """dW = b^T a and db = sum b, over all rows."""
    a, gradients = call.input.detach(), {}
    if call.argument("weight").ndim == 1:  # one output, without an axis of its own
        b = b.unsqueeze(-1)
    rows = b.reshape(-1, b.shape[-1])
    if "weight" in call.sources:
        dw = rows.T @ a.reshape(-1, a.shape[-1]).to(rows.dtype)
        gradients["weight"] = dw.view(call.argument("weight").shape)
    if "bias" in call.sources:
        gradients["bias"] = rows.sum(0).view(call.argument("bias").shape)
    return gradients


def _as_product(
    call: LayerCall, directions: Mapping[str, Tensor], b: Tensor, axis: SampleAxis, size: int
) -> Product | None:
    v = directions.get("weight")
    if v is None or v.ndim != 2 or axis.axis >= b.ndim - 1:
        return None
    a = positions(call.input, axis, size)
    return a, v, positions(b, axis, size), directions.get("bias")


def _sample_parts(
    call: LayerCall, b: Tensor, axis: SampleAxis, size: int
) -> dict[str, GradientPart] | None:
    if call.argument("weight").ndim != 2:
        return None
    left, right = positions(b, axis, size), positions(call.input, axis, size)
    return weight_and_bias(OuterPart(left, right), left)


register_layer(
    F.linear,
    {"weight": 1, "bias": 2},
    weight_gradient=_weight_gradient,
    as_product=_as_product,
    sample_parts=_sample_parts,
)
