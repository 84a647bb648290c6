"""cross_entropy by the Triton kernels: schemas, and the derivatives of losses and weighted loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mts_fast import reference
from mts_fast.backends.triton.eligibility import accumulator, reasons_against_triton
from mts_fast.reference import SampleStatistics, Target

# the fields of a Target, in their order, as arguments of a schema
TARGET = "Tensor labels, Tensor? class_weight, float label_smoothing, int ignore_index"
torch.library.define(
    "mts_fast::cross_entropy_triton",
    f"(Tensor logits, {TARGET}, Tensor? cotangent, bool statistics)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "mts_fast::cross_entropy_backward_triton",
    f"(Tensor logits, {TARGET}, Tensor maximum, Tensor total, Tensor cotangent) -> Tensor",
)
torch.library.define("mts_fast::scale_", "(Tensor(a!) values, Tensor factor) -> ()")


@torch.library.impl("mts_fast::cross_entropy_triton", ("cpu", "cuda"))
def _forward(logits: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    from mts_fast.backends.triton.kernels.cross_entropy import cross_entropy

    target, rest = split_target(arguments)
    return tuple(cross_entropy(logits, target, *rest))


@torch.library.impl("mts_fast::cross_entropy_backward_triton", ("cpu", "cuda"))
def _backward(logits: Tensor, *arguments: Any) -> Tensor:
    from mts_fast.backends.triton.kernels.cross_entropy import cross_entropy_backward

    target, rest = split_target(arguments)
    return cross_entropy_backward(logits, target, *rest)


@torch.library.impl("mts_fast::scale_", ("cpu", "cuda"))
def _scale(values: Tensor, factor: Tensor) -> None:
    from mts_fast.backends.triton.kernels.scale import scale_

    scale_(values, factor)


@torch.library.register_fake("mts_fast::cross_entropy_triton")
def _fake_forward(logits: Tensor, labels: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    cotangent, statistics = arguments[-2:]
    rows, dtype = labels.numel(), accumulator(logits.dtype)
    per_row = [logits.new_empty(rows, dtype=dtype) for _ in range(3)]
    gradient = logits.new_empty(0 if cotangent is None else rows, logits.shape[-1])
    return *per_row, logits.new_empty(3, rows if statistics else 0, dtype=dtype), gradient


@torch.library.register_fake("mts_fast::cross_entropy_backward_triton")
def _fake_backward(logits: Tensor, labels: Tensor, *_: object) -> Tensor:
    return logits.new_empty(labels.numel(), logits.shape[-1])


@torch.library.register_fake("mts_fast::scale_")
def _fake_scale(values: Tensor, factor: Tensor) -> None:
    return None


def reasons(tensors: Sequence[Tensor]) -> list[str]:
    """Why the kernels cannot serve these logits."""
    return reasons_against_triton(tensors, floating="logits")


def split_target(arguments: Sequence[Any]) -> tuple[Target, Sequence[Any]]:
    """The flat arguments of a schema as a target and the arguments after it."""
    fields = len(Target._fields)
    return Target(*arguments[:fields]), arguments[fields:]


def cross_entropy(logits: Tensor, target: Target) -> Tensor:
    """As the reference."""
    losses, _ = _CrossEntropy.apply(logits, *target, False)
    return _of_samples(losses, logits, target)


def weighted_cross_entropy(
    logits: Tensor, target: Target, p: Tensor, *, statistics: bool = False
) -> tuple[Tensor, Tensor, SampleStatistics | None]:
    """(L, l, statistics where asked for), as the reference; everything from one pass.

    Where the logits need a gradient, the same pass computes that of L, and the backward of L does
    not read the logits again.
    """
    if torch.compiler.is_compiling():
        # a gradient kept from the forward to the backward defeats the compiler's memory planning
        rows, table = _CrossEntropy.apply(logits, *target, statistics)
        losses = _of_samples(rows, logits, target)
        loss = (p * losses).sum()
    else:
        loss, losses, table = _Weighted.apply(logits, *target, p, statistics)
    if not statistics:
        return loss, losses, None
    columns = [target.mean_of_positions(row.view(target.labels.shape)) for row in table]
    return loss, losses, SampleStatistics(*columns)


def _of_samples(rows: Tensor, logits: Tensor, target: Target) -> Tensor:
    """Losses of samples [B] from those of rows [M], in the dtype of torch's loss."""
    losses = target.mean_of_positions(rows.view(target.labels.shape))
    return losses.to(_dtype_of_losses(logits))


def _dtype_of_losses(logits: Tensor) -> torch.dtype:
    """The dtype of torch's loss: that of the logits, and float32 under autocast."""
    if torch.is_autocast_enabled(logits.device.type):
        return accumulator(logits.dtype)
    return logits.dtype


def _row_cotangent(per_sample: Tensor, target: Target) -> Tensor:
    """Cotangents of rows [M] from those of samples [B], whose losses are means over positions."""
    labels = target.labels
    if labels.ndim == 1:
        return per_sample
    counted = (labels != target.ignore_index).sum(1).clamp(min=1)
    return (per_sample / counted)[:, None].expand(labels.shape).reshape(-1)


class _CrossEntropy(torch.autograd.Function):
    """(losses [M], statistics [3, M] or [3, 0]) of logits, a flat target and whether statistics are
    wanted; losses are differentiable twice."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        target, (statistics,) = split_target(arguments)
        losses, maximum, total, table, _ = torch.ops.mts_fast.cross_entropy_triton(
            logits, *target, None, statistics
        )
        ctx.save_for_backward(logits, target.labels, target.class_weight, maximum, total)
        ctx.options = target.label_smoothing, target.ignore_index
        ctx.mark_non_differentiable(table)
        return losses, table

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, labels, class_weight, maximum, total = ctx.saved_tensors
        target = Target(labels, class_weight, *ctx.options)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph
            rows = reference.cross_entropy(logits.flatten(0, -2), **target.flat()._asdict())
            gradients = torch.autograd.grad(rows, logits, grad.to(rows.dtype), create_graph=True)
            return *gradients, None, None, None, None, None
        gradient = torch.ops.mts_fast.cross_entropy_backward_triton(
            logits, *target, maximum, total, grad
        )
        return gradient.view(logits.shape), None, None, None, None, None


class _Weighted(torch.autograd.Function):
    """(L [], l [B], statistics [3, M] or [3, 0]) of logits, a flat target, p and whether statistics
    are wanted; L and l are differentiable twice."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        target, (p, statistics) = split_target(arguments)
        # the gradient of L, where the logits need one, is computed in the only read of the logits;
        # not in float16, where p times slope would underflow before a loss scale is applied
        cotangent = None
        if ctx.needs_input_grad[0] and logits.dtype != torch.float16:
            cotangent = _row_cotangent(p.to(accumulator(logits.dtype)), target)
        rows, maximum, total, table, gradient = torch.ops.mts_fast.cross_entropy_triton(
            logits, *target, cotangent, statistics
        )
        losses = target.mean_of_positions(rows.view(target.labels.shape))
        loss = (p * losses).sum()
        dtype = _dtype_of_losses(logits)
        loss, losses = loss.to(torch.promote_types(p.dtype, dtype)), losses.to(dtype)
        ctx.save_for_backward(logits, target.labels, target.class_weight, p, maximum, total, losses)
        ctx.options = target.label_smoothing, target.ignore_index
        ctx.gradient = gradient  # returned by the first backward; a second one computes it again
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(table)
        return loss, losses, table

    @staticmethod
    def backward(
        ctx: Any, grad_loss: Tensor | None, grad_losses: Tensor | None, _: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        logits, labels, class_weight, p, maximum, total, losses = ctx.saved_tensors
        target = Target(labels, class_weight, *ctx.options)
        to_logits, to_p = ctx.needs_input_grad[0], ctx.needs_input_grad[1 + len(target)]
        dtype = accumulator(logits.dtype)
        cotangent = None  # of the losses [B]
        if grad_loss is not None:
            cotangent = grad_loss.to(dtype) * p.to(dtype)
        if grad_losses is not None:
            cotangent = grad_losses.to(dtype) if cotangent is None else cotangent + grad_losses
        d_logits = d_p = None
        if torch.is_grad_enabled():  # create_graph
            losses = reference.cross_entropy(logits, **target._asdict())
            if to_logits and cotangent is not None:
                cotangent = cotangent.to(losses.dtype)
                (d_logits,) = torch.autograd.grad(losses, logits, cotangent, create_graph=True)
        elif to_logits and grad_losses is None and grad_loss is not None and len(ctx.gradient):
            d_logits, ctx.gradient = ctx.gradient.view(logits.shape), ctx.gradient[:0]
            torch.ops.mts_fast.scale_(d_logits, grad_loss)
        elif to_logits and cotangent is not None:
            d_logits = torch.ops.mts_fast.cross_entropy_backward_triton(
                logits, *target, maximum, total, _row_cotangent(cotangent, target)
            ).view(logits.shape)
        if to_p and grad_loss is not None:
            d_p = (grad_loss * losses).to(p.dtype)
        return d_logits, *(None for _ in target), d_p, None
