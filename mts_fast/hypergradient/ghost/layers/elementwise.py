"""x + W and x W, entry by entry: biases by hand, positions, layer scales, temperatures, gates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mts_fast.hypergradient.ghost.parts import DensePart, GradientPart
from mts_fast.hypergradient.ghost.rules import LayerCall, LayerRule
from mts_fast.hypergradient.ghost.sample_axis import SampleAxis
from mts_fast.hypergradient.ghost.source import ParameterSource

_ADDS = {"add", "__add__", "__radd__", "__iadd__"}
_SUBTRACTS = {"sub", "subtract", "__sub__", "__isub__"}
_SUBTRACTS_FROM = {"__rsub__", "rsub"}
_MULTIPLIES = {"mul", "multiply", "__mul__", "__rmul__"}
# per-sample gradients are kept instead of b where they have this share of its entries
FEW = 2


def add(x: Tensor, weight: Tensor, scale: float = 1) -> Tensor:
    """x + scale W, what the rule stands for."""
    return torch.add(x, weight, alpha=scale)


def mul(x: Tensor, weight: Tensor) -> Tensor:
    """x W, what the rule stands for."""
    return x * weight


def _scale(call: LayerCall) -> float:
    return call.args[2]


def _broadcast(weight: Tensor, ndim: int) -> list[int]:
    """The weight's shape as it is broadcast to a tensor of so many axes."""
    return [1] * (ndim - weight.ndim) + list(weight.shape)


def serves_all_samples(call: LayerCall, axis: SampleAxis, ndim: int) -> bool:
    """Whether the weight is broadcast over the samples."""
    return _broadcast(call.argument("weight"), ndim)[axis.axis] == 1


def _per_sample(call: LayerCall, terms: Tensor, axis: SampleAxis, size: int) -> Tensor:
    """[B, *weight] of the terms whose sums are the gradient's entries."""
    weight = call.argument("weight")
    shape = _broadcast(weight, terms.ndim)
    del shape[axis.axis]
    rows = axis.samples(terms, size)  # [B, r, *other axes]
    summed = [1, *(2 + k for k, n in enumerate(shape) if n == 1)]
    total = rows.sum(summed, dtype=torch.promote_types(rows.dtype, torch.float32))
    return total.reshape(size, *weight.shape)


def _terms(call: LayerCall, b: Tensor) -> Tensor:
    if call.rule.function is mul:
        return call.input.detach() * b
    return b if _scale(call) == 1 else b * _scale(call)


def _tangent(call: LayerCall, directions: Mapping[str, Tensor]) -> Tensor:
    v = directions["weight"]
    if call.rule.function is mul:
        return call.input.detach() * v
    return v if _scale(call) == 1 else v * _scale(call)


def _weight_gradient(call: LayerCall, b: Tensor) -> dict[str, Tensor]:
    return {"weight": _terms(call, b).sum_to_size(call.argument("weight").shape)}


def _sample_gradients(call: LayerCall, b: Tensor, axis: SampleAxis, size: int) -> dict[str, Tensor]:
    return {"weight": _per_sample(call, _terms(call, b), axis, size)}


def _sample_parts(
    call: LayerCall, b: Tensor, axis: SampleAxis, size: int
) -> dict[str, GradientPart]:
    if not serves_all_samples(call, axis, b.ndim):
        alone = [_weight_gradient(call, axis.alone(b, i, size))["weight"] for i in range(size)]
        return {"weight": DensePart(torch.stack([g.flatten() for g in alone]))}
    return {"weight": DensePart(_sample_gradients(call, b, axis, size)["weight"].reshape(size, -1))}


def _rule(function: Callable[..., Any]) -> LayerRule:
    return LayerRule(
        function,
        {"weight": 1},
        tangent=_tangent,
        weight_gradient=_weight_gradient,
        sample_parts=_sample_parts,
        reads_input=function is not add,
    )


_RULES = {function: _rule(function) for function in (add, mul)}
_FEW = {
    function: replace(rule, sample_gradients=_sample_gradients, few=serves_all_samples)
    for function, rule in _RULES.items()
}


def elementwise_call(
    name: str,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    position: int,
    source: ParameterSource,
    size: int,
) -> LayerCall | None:
    """The call as x + c W or x W with W the argument at `position`; None where it is neither.

    Args:
        name: the function's.
        source: where W comes from.
        size: B.
    """
    if len(args) not in (2, 3) or position > 1 or set(kwargs) - {"alpha"}:
        return None
    x, weight = args[1 - position], args[position]
    scale = kwargs.get("alpha", args[2] if len(args) > 2 else 1)
    if not isinstance(x, Tensor) or isinstance(scale, Tensor):
        return None
    first = position == 0
    function: Callable[..., Tensor]
    arguments: tuple[Any, ...]
    if name in _ADDS:
        function, arguments = add, (None, weight, 1 if first else scale)
    elif name in _SUBTRACTS:
        function, arguments = add, (None, weight, 1 if first else -scale)
    elif name in _SUBTRACTS_FROM:
        function, arguments = add, (None, weight, -scale if first else 1)
    elif name in _MULTIPLIES and len(args) == 2:
        function, arguments = mul, (x, weight)
    else:
        return None
    entries = torch.broadcast_shapes(x.shape, weight.shape).numel()
    few = FEW * weight.numel() * size <= entries
    rule = (_FEW if few else _RULES)[function]
    return LayerCall(rule, arguments, {}, {"weight": source})
