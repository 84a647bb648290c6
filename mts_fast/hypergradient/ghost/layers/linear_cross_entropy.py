"""linear_cross_entropy: a last layer whose output is the losses, not linear in its weight."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mts_fast import ops
from mts_fast.hypergradient.ghost.rules import LayerCall, register_layer
from mts_fast.hypergradient.ghost.sample_axis import SampleAxis


def _tangent(call: LayerCall, directions: Mapping[str, Tensor]) -> Tensor:
    return ops.linear_cross_entropy_tangent(
        *call.args,
        **call.kwargs,
        weight_tangent=directions.get("weight"),
        bias_tangent=directions.get("bias"),
    )


def _sample_parts(call: LayerCall, b: Tensor, axis: SampleAxis, size: int) -> str:
    return "linear_cross_entropy has no logits to look at"


register_layer(
    ops.linear_cross_entropy,
    {"weight": 1, "bias": 3},
    tangent=_tangent,
    sample_parts=_sample_parts,
)
