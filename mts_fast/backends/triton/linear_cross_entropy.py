"""linear_cross_entropy by the Triton kernels: schemas, derivatives and the tangent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mts_fast import reference
from mts_fast.backends.triton.cross_entropy import TARGET, split_target
from mts_fast.backends.triton.eligibility import accumulator, reasons_against_triton
from mts_fast.reference import Target

# the fields of the kernels' `Problem` (hidden, weight, bias, target) as arguments of a schema
PROBLEM = f"Tensor hidden, Tensor weight, Tensor? bias, {TARGET}"
torch.library.define(
    "mts_fast::linear_cross_entropy_triton", f"({PROBLEM}) -> (Tensor, Tensor, Tensor)"
)
torch.library.define(
    "mts_fast::linear_cross_entropy_backward_triton",
    f"({PROBLEM}, Tensor maximum, Tensor total, Tensor cotangent, bool[3] needed)"
    " -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "mts_fast::linear_cross_entropy_tangent_triton",
    f"({PROBLEM}, Tensor maximum, Tensor total, Tensor? weight_tangent, Tensor? bias_tangent)"
    " -> Tensor",
)


@torch.library.impl("mts_fast::linear_cross_entropy_triton", ("cpu", "cuda"))
def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    from mts_fast.backends.triton.kernels.linear_cross_entropy import linear_cross_entropy

    problem, _ = _split_problem(arguments)
    return tuple(linear_cross_entropy(problem))


@torch.library.impl("mts_fast::linear_cross_entropy_backward_triton", ("cpu", "cuda"))
def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    from mts_fast.backends.triton.kernels.linear_cross_entropy_backward import (
        linear_cross_entropy_backward,
    )

    problem, rest = _split_problem(arguments)
    return linear_cross_entropy_backward(problem, *rest)


@torch.library.impl("mts_fast::linear_cross_entropy_tangent_triton", ("cpu", "cuda"))
def _tangent(*arguments: Any) -> Tensor:
    from mts_fast.backends.triton.kernels.linear_cross_entropy_backward import (
        linear_cross_entropy_tangent,
    )

    problem, rest = _split_problem(arguments)
    return linear_cross_entropy_tangent(problem, *rest)


def _split_problem(arguments: Sequence[Any]) -> tuple[Any, Sequence[Any]]:
    """The flat arguments of a schema as the kernels' `Problem` and the arguments after it."""
    from mts_fast.backends.triton.kernels.logits_tile import Problem

    target, rest = split_target(arguments[3:])
    hidden, weight, bias = arguments[:3]
    return Problem(hidden, weight, bias, target), rest


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
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Target
) -> Tensor:
    """As the reference."""
    dtype = _dtype(hidden)
    rows = _Losses.apply(hidden.flatten(0, -2).to(dtype), weight.to(dtype), bias, *target.flat())
    losses = target.mean_of_positions(rows.view(target.labels.shape))
    autocast = torch.is_autocast_enabled(hidden.device.type)
    return losses if autocast else losses.to(hidden.dtype)


def linear_cross_entropy_tangent(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Target,
    *,
    weight_tangent: Tensor | None,
    bias_tangent: Tensor | None,
) -> Tensor:
    """As the reference; the logits and their tangents exist one tile at a time."""
    dtype, labels = _dtype(hidden), target.labels
    rows = hidden.flatten(0, -2).to(dtype).contiguous()
    problem = (rows, weight.to(dtype).contiguous(), bias, *target.flat())
    _, maximum, total = torch.ops.mts_fast.linear_cross_entropy_triton(*problem)
    if weight_tangent is not None:
        weight_tangent = weight_tangent.to(dtype).contiguous()
    if bias_tangent is not None:
        bias_tangent = bias_tangent.contiguous()
    tangents = torch.ops.mts_fast.linear_cross_entropy_tangent_triton(
        *problem, maximum, total, weight_tangent, bias_tangent
    )
    ignored = labels == target.ignore_index
    return target.mean_of_positions(tangents.view(labels.shape).masked_fill(ignored, 0.0))


def _dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of the matrix product: that of hidden, or autocast's."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


class _Losses(torch.autograd.Function):
    """losses [M] of hidden [M, D], weight [C, D], bias and a flat target; differentiable twice."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, *fields: Any
    ) -> Tensor:
        target = Target(*fields)
        hidden, weight = hidden.contiguous(), weight.contiguous()
        bias = bias if bias is None else bias.contiguous()
        losses, maximum, total = torch.ops.mts_fast.linear_cross_entropy_triton(
            hidden, weight, bias, *target
        )
        ctx.save_for_backward(
            *(hidden, weight, bias, target.labels, target.class_weight, maximum, total)
        )
        ctx.options = target.label_smoothing, target.ignore_index
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, class_weight, maximum, total = ctx.saved_tensors
        target = Target(labels, class_weight, *ctx.options)
        needed = list(ctx.needs_input_grad[:3])
        gradients: Sequence[Tensor]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph
            # aliases: where hidden itself depends on the weight, autograd.grad would include the
            # gradient through hidden, which autograd adds later
            hidden, weight = hidden.view_as(hidden), weight.view_as(weight)
            bias = bias if bias is None else bias.view_as(bias)
            losses = reference.linear_cross_entropy(hidden, weight, bias=bias, **target._asdict())
            inputs = [t for t, need in zip((hidden, weight, bias), needed, strict=True) if need]
            computed = iter(
                torch.autograd.grad(losses, inputs, grad.to(losses.dtype), create_graph=True)
            )
            gradients = [next(computed) if need else grad for need in needed]
        else:
            gradients = torch.ops.mts_fast.linear_cross_entropy_backward_triton(
                hidden, weight, bias, *target, maximum, total, grad, needed
            )
        d_hidden, d_weight, d_bias = (
            g if need else None for g, need in zip(gradients, needed, strict=True)
        )
        if bias is not None and d_bias is not None:
            d_bias = d_bias.to(bias.dtype)
        return d_hidden, d_weight, d_bias, *(None for _ in target)
