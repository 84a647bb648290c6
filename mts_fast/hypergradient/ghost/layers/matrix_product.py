"""Products with a weight matrix, y = a W (matmul) or c + a W (addmm); and einsum."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mts_fast.hypergradient.ghost.layers.positions import positions, weight_and_bias
from mts_fast.hypergradient.ghost.parts import GradientPart, OuterPart
from mts_fast.hypergradient.ghost.rules import LayerCall, Product, register_layer
from mts_fast.hypergradient.ghost.sample_axis import SampleAxis


def _is_plain(call: LayerCall, weight: Tensor) -> bool:
    """Whether y = c + a W with W [K, N] and c [N], not broadcast; addmm's alpha and beta are 1."""
    bias = call.argument("bias") if "bias" in call.sources else None
    factors = [call.kwargs.get(name, 1) for name in ("alpha", "beta")]
    same_width = bias is None or bias.shape == weight.shape[1:]
    return weight.ndim == 2 and same_width and factors == [1, 1]


def _as_product(
    call: LayerCall, directions: Mapping[str, Tensor], b: Tensor, axis: SampleAxis, size: int
) -> Product | None:
    v = directions.get("weight")
    if v is None or not _is_plain(call, v) or axis.axis >= b.ndim - 1:
        return None
    a = positions(call.input, axis, size)
    return a, v.T, positions(b, axis, size), directions.get("bias")


def _sample_parts(
    call: LayerCall, b: Tensor, axis: SampleAxis, size: int
) -> dict[str, GradientPart] | None:
    if not _is_plain(call, call.argument("weight")):
        return None
    left, right = positions(b, axis, size), positions(call.input, axis, size)
    return weight_and_bias(OuterPart(right, left), left)


for _function in (torch.matmul, Tensor.matmul, Tensor.__matmul__):
    register_layer(_function, {"weight": 1}, as_product=_as_product, sample_parts=_sample_parts)
register_layer(
    torch.addmm,
    {"bias": 0, "weight": 2},
    input=1,
    nullable=(),
    as_product=_as_product,
    sample_parts=_sample_parts,
)
register_layer(torch.einsum, {"weight": 2}, input=1)
