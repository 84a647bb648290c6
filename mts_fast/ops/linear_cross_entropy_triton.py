"""linear_cross_entropy by the Triton kernels: schemas, derivatives and the tangent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mts_fast import reference
from mts_fast._triton import accumulator, reasons_against_triton
from mts_fast.ops.transforms import under_transform

_PROBLEM = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? class_weight,"
    " float label_smoothing, int ignore_index"
)
torch.library.define(
    "mts_fast::linear_cross_entropy_triton", f"({_PROBLEM}) -> (Tensor, Tensor, Tensor)"
)
torch.library.define(
    "mts_fast::linear_cross_entropy_backward_triton",
    f"({_PROBLEM}, Tensor maximum, Tensor total, Tensor cotangent, bool[3] needed)"
    " -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "mts_fast::linear_cross_entropy_tangent_triton",
    f"({_PROBLEM}, Tensor maximum, Tensor total, Tensor? weight_tangent, Tensor? bias_tangent)"
    " -> Tensor",
)
# arguments of a problem in the schemas
_WIDTH = _PROBLEM.count(",") + 1


@torch.library.impl("mts_fast::linear_cross_entropy_triton", ("cpu", "cuda"))
def _forward(*problem: Any) -> tuple[Tensor, ...]:
    from mts_fast.kernels.linear_cross_entropy import linear_cross_entropy
    from mts_fast.kernels.logits_tile import Problem

    return tuple(linear_cross_entropy(Problem(*problem)))


@torch.library.impl("mts_fast::linear_cross_entropy_backward_triton", ("cpu", "cuda"))
def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    from mts_fast.kernels.linear_cross_entropy_slopes import linear_cross_entropy_backward
    from mts_fast.kernels.logits_tile import Problem

    return linear_cross_entropy_backward(Problem(*arguments[:_WIDTH]), *arguments[_WIDTH:])


@torch.library.impl("mts_fast::linear_cross_entropy_tangent_triton", ("cpu", "cuda"))
def _tangent(*arguments: Any) -> Tensor:
    from mts_fast.kernels.linear_cross_entropy_slopes import linear_cross_entropy_tangent
    from mts_fast.kernels.logits_tile import Problem

    return linear_cross_entropy_tangent(Problem(*arguments[:_WIDTH]), *arguments[_WIDTH:])


@torch.library.register_fake("mts_fast::linear_cross_entropy_triton")
def _fake_forward(hidden: Tensor, *_: object) -> tuple[Tensor, ...]:
    return tuple(hidden.new_empty(len(hidden), dtype=accumulator(hidden.dtype)) for _ in range(3))


@torch.library.register_fake("mts_fast::linear_cross_entropy_backward_triton")
def _fake_backward(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    needed, (classes, width) = rest[-1], weight.shape
    return (
        hidden.new_empty(len(hidden) if needed[0] else 0, width),
        weight.new_empty(classes if needed[1] else 0, width),
        hidden.new_empty(classes if needed[2] else 0, dtype=accumulator(hidden.dtype)),
    )


@torch.library.register_fake("mts_fast::linear_cross_entropy_tangent_triton")
def _fake_tangent(hidden: Tensor, *_: object) -> Tensor:
    return hidden.new_empty(len(hidden), dtype=accumulator(hidden.dtype))


def reasons(tensors: Sequence[Tensor]) -> list[str]:
    """Why the kernels cannot serve these hidden states and this weight."""
    return reasons_against_triton(tensors, floating="hidden and weight")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
) -> Tensor:
    """As the reference, which serves torch.func and forward-mode differentiation."""
    if under_transform():
        return reference.linear_cross_entropy(
            *(hidden, weight, labels, bias),
            class_weight=class_weight,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
        )
    dtype = _dtype(hidden)
    rows = _Losses.apply(
        *(hidden.flatten(0, -2).to(dtype), weight.to(dtype), bias, labels.flatten()),
        *(class_weight, label_smoothing, ignore_index),
    )
    losses = reference.mean_of_positions(rows.view(labels.shape), labels, ignore_index)
    autocast = torch.is_autocast_enabled(hidden.device.type)
    return losses if autocast else losses.to(hidden.dtype)


def linear_cross_entropy_tangent(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    weight_tangent: Tensor | None,
    bias_tangent: Tensor | None,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
) -> Tensor:
    """As the reference; the logits and their tangents live a tile at a time."""
    dtype = _dtype(hidden)
    rows = hidden.flatten(0, -2).to(dtype).contiguous()
    problem = (
        *(rows, weight.to(dtype).contiguous(), bias, labels.flatten()),
        *(class_weight, label_smoothing, ignore_index),
    )
    _, maximum, total = torch.ops.mts_fast.linear_cross_entropy_triton(*problem)
    if weight_tangent is not None:
        weight_tangent = weight_tangent.to(dtype).contiguous()
    if bias_tangent is not None:
        bias_tangent = bias_tangent.contiguous()
    found = torch.ops.mts_fast.linear_cross_entropy_tangent_triton(
        *problem, maximum, total, weight_tangent, bias_tangent
    )
    return reference.mean_of_positions(
        found.view(labels.shape).masked_fill(labels == ignore_index, 0.0), labels, ignore_index
    )


def _dtype(hidden: Tensor) -> torch.dtype:
    """What the product is made in: that of hidden, or autocast's."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


class _Losses(torch.autograd.Function):
    """losses [M], of hidden [M, D] and weight [C, D]; differentiable twice."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        class_weight: Tensor | None,
        label_smoothing: float,
        ignore_index: int,
    ) -> Tensor:
        hidden, weight = hidden.contiguous(), weight.contiguous()
        bias = bias if bias is None else bias.contiguous()
        losses, maximum, total = torch.ops.mts_fast.linear_cross_entropy_triton(
            hidden, weight, bias, labels, class_weight, label_smoothing, ignore_index
        )
        ctx.save_for_backward(hidden, weight, bias, labels, class_weight, maximum, total)
        ctx.options = label_smoothing, ignore_index
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, class_weight, maximum, total = ctx.saved_tensors
        label_smoothing, ignore_index = ctx.options
        needed = list(ctx.needs_input_grad[:3])
        found: Sequence[Tensor]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph
            # aliases: hidden may itself depend on the weight, and its part comes later
            hidden, weight = hidden.view_as(hidden), weight.view_as(weight)
            bias = bias if bias is None else bias.view_as(bias)
            again = reference.linear_cross_entropy(
                *(hidden, weight, labels, bias),
                class_weight=class_weight,
                label_smoothing=label_smoothing,
                ignore_index=ignore_index,
            )
            wanted = [t for t, need in zip((hidden, weight, bias), needed, strict=True) if need]
            made = iter(torch.autograd.grad(again, wanted, grad.to(again.dtype), create_graph=True))
            found = [next(made) if need else grad for need in needed]
        else:
            found = torch.ops.mts_fast.linear_cross_entropy_backward_triton(
                *(hidden, weight, bias, labels, class_weight, label_smoothing, ignore_index),
                *(maximum, total, grad, needed),
            )
        d_hidden, d_weight, d_bias = (
            g if need else None for g, need in zip(found, needed, strict=True)
        )
        if bias is not None and d_bias is not None:
            d_bias = d_bias.to(bias.dtype)
        return d_hidden, d_weight, d_bias, None, None, None, None
