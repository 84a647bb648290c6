"""Convolutions of one to three axes, transposed or not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mts_fast.hypergradient.ghost.parts import DensePart, GradientPart, OuterPart
from mts_fast.hypergradient.ghost.rules import LayerCall, LayerRule, Product, register_layer
from mts_fast.hypergradient.ghost.sample_axis import SampleAxis

CONVOLUTIONS = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}
_TRANSPOSED = {F.conv_transpose1d: 1, F.conv_transpose2d: 2, F.conv_transpose3d: 3}


def _options(call: LayerCall) -> dict[str, Any] | None:
    """The options of torch's convolution backward.

    None for padding by name, and for an input without a batch axis.
    """
    function = call.rule.function
    transposed = function in _TRANSPOSED
    axes = (_TRANSPOSED if transposed else CONVOLUTIONS)[function]
    # positions after (input, weight, bias) as torch declares them
    order = "stride padding dilation groups"
    if transposed:
        order = "stride padding output_padding groups dilation"
    option = {"stride": 1, "padding": 0, "output_padding": 0, "groups": 1, "dilation": 1}
    option |= dict(zip(order.split(), call.args[3:], strict=False)) | call.kwargs
    if isinstance(option["padding"], str) or call.input.ndim != axes + 2:
        return None

    def per_axis(name: str) -> list[int]:
        value = option[name]
        return [value] * axes if isinstance(value, int) else list(value)

    lists = ("stride", "padding", "output_padding", "dilation")
    return {n: per_axis(n) for n in lists} | {"transposed": transposed, "groups": option["groups"]}


def _weight_gradient(call: LayerCall, b: Tensor) -> dict[str, Tensor]:
    """torch's own convolution backward without its input gradient."""
    options = _options(call)
    if options is None:
        # without this function: by autograd
        plain = LayerRule(call.rule.function, call.rule.parameters)
        return LayerCall(plain, call.args, call.kwargs, call.sources).weight_gradients(b)
    wanted = [False, "weight" in call.sources, "bias" in call.sources]
    _, dw, db = torch.ops.aten.convolution_backward(
        b,
        call.input.detach().to(b.dtype),
        call.argument("weight").detach().to(b.dtype),
        [b.shape[1]],
        **options,
        output_mask=wanted,
    )
    return {n: g for n, g in {"weight": dw, "bias": db}.items() if n in call.sources}


def _as_product(
    call: LayerCall, directions: Mapping[str, Tensor], b: Tensor, axis: SampleAxis, size: int
) -> Product | None:
    """A 1 x 1 convolution with stride 1 is a linear layer on the channels of every position."""
    v, a, options = directions.get("weight"), call.input.detach(), _options(call)
    if v is None or options is None or axis != SampleAxis() or not len(a) == len(b) == size:
        return None
    if any(k != 1 for k in v.shape[2:]) or options["transposed"] or options["groups"] != 1:
        return None
    plain = {"stride": 1, "padding": 0, "output_padding": 0}
    if any(set(options[name]) != {value} for name, value in plain.items()):
        return None
    bias = directions.get("bias")
    return a.flatten(2).transpose(1, 2), v.flatten(1), b.flatten(2).transpose(1, 2), bias


def _sample_parts(
    call: LayerCall, b: Tensor, axis: SampleAxis, size: int
) -> dict[str, GradientPart] | None:
    """Gram matrices where positions are few, else one convolution with a group per sample."""
    options = _options(call)
    if options is None or axis != SampleAxis() or len(b) != size:
        return None
    a, weight = call.input.detach().to(b.dtype), call.argument("weight").detach()
    flat = b.flatten(2).transpose(1, 2)  # [B, L, O]
    parts: dict[str, GradientPart] = {"bias": DensePart(flat.sum(1))}
    if "weight" in call.sources:
        entries, positions = weight[0].numel(), flat.shape[1]
        plain = a.ndim == 4 and not options["transposed"] and options["groups"] == 1
        if plain and positions * (entries + len(weight)) < entries * len(weight):
            named = {n: options[n] for n in ("dilation", "padding", "stride")}
            patches = F.unfold(a, tuple(weight.shape[2:]), **named).transpose(1, 2)  # [B, L, C k]
            parts["weight"] = OuterPart(flat, patches)
        else:
            groups = options["groups"] * size
            _, dw, _ = torch.ops.aten.convolution_backward(
                b.reshape(1, -1, *b.shape[2:]),
                a.reshape(1, -1, *a.shape[2:]),
                weight.to(b.dtype).repeat(size, *[1] * (weight.ndim - 1)),
                None,
                **{**options, "groups": groups},
                output_mask=[False, True, False],
            )
            parts["weight"] = DensePart(dw.reshape(size, -1))
    return parts


_functions: list[Callable[..., Any]] = [*CONVOLUTIONS, *_TRANSPOSED]
for _function in _functions:
    register_layer(
        _function,
        {"weight": 1, "bias": 2},
        weight_gradient=_weight_gradient,
        as_product=_as_product,
        sample_parts=_sample_parts,
    )
