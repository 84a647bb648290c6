"""Normalisation layers: their parameters are few, so each sample's own gradient of them is kept.

y = w x^ + c, with x^ the normalised input: sample i's gradients are the sums over its positions of
x^ b and of b. They give the dots and the gradient for any weights; one normalisation, no replay,
and one pass over x and b where a kernel of `norm_sample_gradients` is in force.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mts_fast.hypergradient.ghost.rules import LayerCall, SampleGradients, register_layer
from mts_fast.hypergradient.ghost.sample_axis import SampleAxis
from mts_fast.ops import kernel_for
from mts_fast.ops.norm_sample_gradients import (
    GROUP_NORM,
    LAYER_NORM,
    group_norm_variant,
    layer_norm_variant,
)


@dataclass(frozen=True)
class ChannelStatistics:
    """How a norm with its channels on axis 1 makes x^: by each group's mean and variance, or by
    those passed."""

    groups: int
    eps: float
    mean: Tensor | None = None  # [C]
    variance: Tensor | None = None  # [C]


def _terms(call: LayerCall, name: str, b: Tensor) -> Tensor:
    """The terms, one per entry of the output, whose sum is a parameter's gradient."""
    if name == "bias":
        return b
    # without parameters the layer returns x^ in a new tensor, which may be overwritten
    normalized = call.replay_with(dict.fromkeys(call.rule.parameters))
    return normalized.mul_(b) if normalized.dtype == b.dtype else normalized * b


def _sum(rows: Tensor, axis: int = 1) -> Tensor:
    """Sum over an axis, in float32 at least."""
    return rows.sum(axis, dtype=_at_least_float32(rows.dtype))


@functools.cache
def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _of_last_axes(call: LayerCall, b: Tensor, axis: SampleAxis, size: int) -> dict[str, Tensor]:
    """Layer and RMS norm."""
    fused = _of_last_axes_fused(call, b, axis, size)
    if fused is not None:
        return fused
    gradients = {}
    for name in call.sources:
        shape = call.argument(name).shape
        rows = axis.samples(_terms(call, name, b), size).reshape(size, -1, *shape)
        gradients[name] = _sum(rows)
    return gradients


def _of_last_axes_fused(
    call: LayerCall, b: Tensor, axis: SampleAxis, size: int
) -> dict[str, Tensor] | None:
    """The same by a kernel; None where there is none for these tensors."""
    first = axis == SampleAxis() or (axis == SampleAxis(axis.axis) and b.shape[axis.axis] == size)
    if "weight" not in call.sources or not first:
        return None
    shape = call.argument("weight").shape
    x, b = (axis.samples(t, size).reshape(size, -1, shape.numel()) for t in (call.input, b))
    centered, bias = call.rule.function is F.layer_norm, "bias" in call.sources
    run = kernel_for(LAYER_NORM, [x, b], layer_norm_variant(centered, bias))
    if run is None:
        return None
    eps = call.option("eps", 4, 1e-5) if centered else call.option("eps", 3, None)
    # torch's rms_norm without eps takes that of the dtype in which it computes
    eps = torch.finfo(_at_least_float32(x.dtype)).eps if eps is None else eps
    sums = run(x, b, eps, centered, bias)
    by_name = zip(("weight", "bias"), sums, strict=True)
    return {name: g.reshape(size, *shape) for name, g in by_name if name in call.sources}


def _of_channels(call: LayerCall, b: Tensor, axis: SampleAxis, size: int) -> dict[str, Tensor]:
    """Group, instance and batch norm: the channels on axis 1."""
    if axis == SampleAxis():
        fused = _of_channels_fused(call, b)
        if fused is not None:
            return {name: _sum(g.unflatten(0, (size, -1))) for name, g in fused.items()}
    gradients = {}
    for name in call.sources:
        terms = _terms(call, name, b)
        if axis.axis != 0:
            # [B, r, rows of axis 0, C, ...] -> [B, C, r, rows of axis 0, ...]
            rows = axis.samples(terms, size).movedim(3, 1)
            gradients[name] = _sum(rows.flatten(2), 2)
            continue
        per_row = _sum(terms.flatten(2).transpose(1, 2)) if terms.ndim > 2 else terms  # [B r, C]
        gradients[name] = _sum(axis.samples(per_row, size).reshape(size, -1, per_row.shape[1]))
    return gradients


def _of_channels_fused(call: LayerCall, b: Tensor) -> dict[str, Tensor] | None:
    """The gradients of each row of axis 0 by a kernel; None where there is none."""
    if "weight" not in call.sources or b.ndim < 3:
        return None
    x, b = call.input.flatten(2), b.flatten(2)
    by = _channel_statistics(call, x.shape[1])
    passed = [t for t in (by.mean, by.variance) if t is not None]
    run = kernel_for(GROUP_NORM, [x, b, *passed], group_norm_variant(by.groups))
    if run is None:
        return None
    sums = run(x, b, by.groups, by.eps, by.mean, by.variance)
    by_name = zip(("weight", "bias"), sums, strict=True)
    return {name: g for name, g in by_name if name in call.sources}


def _channel_statistics(call: LayerCall, channels: int) -> ChannelStatistics:
    if call.rule.function is F.group_norm:
        return ChannelStatistics(call.option("num_groups", 1), call.option("eps", 4, 1e-5))
    eps = call.option("eps", 7, 1e-5)
    if call.rule.function is F.instance_norm and call.option("use_input_stats", 5, True):
        return ChannelStatistics(channels, eps)
    moments = call.option("running_mean", 1), call.option("running_var", 2)
    return ChannelStatistics(channels, eps, *moments)


def _batch_norm_couples(call: LayerCall) -> str | None:
    training = call.args[5] if len(call.args) > 5 else call.kwargs.get("training", False)
    return "BatchNorm in train mode mixes the samples of a batch" if training else None


def _without_statistics(call: LayerCall) -> dict[str, tuple[int, Any]]:
    """Replays of instance norm without running statistics, where it would update them."""
    if call.option("use_input_stats", 5, True):
        return {"running_mean": (1, None), "running_var": (2, None)}
    return {}


def _register(
    function: Callable[..., Any], per_sample: SampleGradients, parameters: dict, **rule: Any
) -> None:
    """Register a normalisation layer. Its weight gradient is `per_sample` summed over axis 0,
    wherever the samples lie.

    Not by autograd: torch's group norm backward without an input gradient crashes on channels_last.
    """

    def gradient(call: LayerCall, b: Tensor) -> dict[str, Tensor]:
        return {name: g.sum(0) for name, g in per_sample(call, b, SampleAxis(), len(b)).items()}

    register_layer(
        function, parameters, sample_gradients=per_sample, weight_gradient=gradient, **rule
    )


_register(F.layer_norm, _of_last_axes, {"weight": 2, "bias": 3})
_register(F.rms_norm, _of_last_axes, {"weight": 2})
_register(F.group_norm, _of_channels, {"weight": 2, "bias": 3})
_register(
    F.instance_norm, _of_channels, {"weight": 3, "bias": 4}, replay_options=_without_statistics
)
_register(F.batch_norm, _of_channels, {"weight": 3, "bias": 4}, couples_samples=_batch_norm_couples)
