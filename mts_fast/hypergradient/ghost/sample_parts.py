"""What one use of a parameter adds to every sample's gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from mts_fast.hypergradient.ghost.parts import DensePart, GradientPart
from mts_fast.hypergradient.ghost.reasons import Unsupported
from mts_fast.hypergradient.ghost.recorded import RecordedCall
from mts_fast.hypergradient.ghost.rules import LayerCall
from mts_fast.hypergradient.ghost.sample_axis import SampleAxis


def sample_parts(
    use: RecordedCall, axis: SampleAxis, b: Tensor, size: int
) -> dict[str, GradientPart]:
    """The parts of one use by argument name, for the output cotangent b of sum_i l_i."""
    call = use.call
    if call is None:
        return {"value": DensePart(_alone(b, axis, size))}
    rule = call.rule
    if rule.sample_gradients is not None and (rule.few is None or rule.few(call, axis, b.ndim)):
        by_name = rule.sample_gradients(call, b, axis, size)
        return {name: DensePart(g.reshape(size, -1)) for name, g in by_name.items()}
    if rule.sample_parts is not None:
        parts = rule.sample_parts(call, b, axis, size)
        if isinstance(parts, str):
            raise Unsupported([f"{use.path}: {parts}"])
        if parts is not None:
            return {name: part for name, part in parts.items() if name in call.sources}
    if axis != SampleAxis() or len(b) != size or len(call.input) != size:
        name = rule.function.__name__
        raise Unsupported([f"{use.path}: {name} with its batch elsewhere"])
    return _one_by_one(call, b, size)


def _one_by_one(call: LayerCall, b: Tensor, size: int) -> dict[str, GradientPart]:
    """Any other layer with the batch first: its weight gradient, sample after sample."""
    position = call.rule.input
    rows: dict[str, list[Tensor]] = {name: [] for name in call.sources}
    for i in range(size):
        args = list(call.args)
        args[position] = call.input[i : i + 1]
        one = LayerCall(call.rule, tuple(args), call.kwargs, call.sources)
        for name, g in one.weight_gradients(b[i : i + 1]).items():
            rows[name].append(g.flatten())
    return {name: DensePart(torch.stack(gradients)) for name, gradients in rows.items()}


def _alone(b: Tensor, axis: SampleAxis, size: int) -> Tensor:
    """[B, entries of b]: b with the entries of one sample alone, and 0 elsewhere."""
    return torch.stack([axis.alone(b, i, size).flatten() for i in range(size)])
