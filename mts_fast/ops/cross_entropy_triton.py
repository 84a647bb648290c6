"""cross_entropy by the Triton kernels: schemas, and the derivatives of losses and weighted loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mts_fast import reference
from mts_fast._triton import accumulator, reasons_against_triton
from mts_fast.ops.transforms import under_transform
from mts_fast.reference import SampleStatistics

torch.library.define(
    "mts_fast::cross_entropy_triton",
    "(Tensor logits, Tensor labels, Tensor? class_weight, Tensor? cotangent,"
    " float label_smoothing, int ignore_index, bool statistics)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "mts_fast::cross_entropy_backward_triton",
    "(Tensor logits, Tensor labels, Tensor? class_weight, Tensor maximum, Tensor total,"
    " Tensor cotangent, float label_smoothing, int ignore_index) -> Tensor",
)
torch.library.define("mts_fast::scale_", "(Tensor(a!) values, Tensor factor) -> ()")


@torch.library.impl("mts_fast::cross_entropy_triton", ("cpu", "cuda"))
def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    from mts_fast.kernels.cross_entropy import cross_entropy

    return tuple(cross_entropy(*arguments))


@torch.library.impl("mts_fast::cross_entropy_backward_triton", ("cpu", "cuda"))
def _backward(*arguments: Any) -> Tensor:
    from mts_fast.kernels.cross_entropy import cross_entropy_backward

    return cross_entropy_backward(*arguments)


@torch.library.impl("mts_fast::scale_", ("cpu", "cuda"))
def _scale(values: Tensor, factor: Tensor) -> None:
    from mts_fast.kernels.scale import scale_

    scale_(values, factor)


@torch.library.register_fake("mts_fast::cross_entropy_triton")
def _fake_forward(
    logits: Tensor,
    labels: Tensor,
    class_weight: Tensor | None,
    cotangent: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
    statistics: bool,
) -> tuple[Tensor, ...]:
    rows = labels.numel()
    wide = accumulator(logits.dtype)
    row = [logits.new_empty(rows, dtype=wide) for _ in range(3)]
    gradient = logits.new_empty(0 if cotangent is None else rows, logits.shape[-1])
    return *row, logits.new_empty(3, rows if statistics else 0, dtype=wide), gradient


@torch.library.register_fake("mts_fast::cross_entropy_backward_triton")
def _fake_backward(logits: Tensor, labels: Tensor, *_: object) -> Tensor:
    return logits.new_empty(labels.numel(), logits.shape[-1])


@torch.library.register_fake("mts_fast::scale_")
def _fake_scale(values: Tensor, factor: Tensor) -> None:
    return None


def reasons(tensors: Sequence[Tensor]) -> list[str]:
    """Why the kernels cannot serve these logits."""
    return reasons_against_triton(tensors, floating="logits")


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
) -> Tensor:
    """As the reference, which serves torch.func and forward-mode differentiation."""
    if under_transform():
        return reference.cross_entropy(
            logits,
            labels,
            class_weight=class_weight,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
        )
    rows, _ = _CrossEntropy.apply(
        logits, labels, class_weight, label_smoothing, ignore_index, False
    )
    return _of_samples(rows, logits, labels, ignore_index)


def weighted_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    p: Tensor,
    *,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    statistics: bool = False,
) -> tuple[Tensor, Tensor, SampleStatistics | None]:
    """(L, l, statistics where asked for), as the reference; everything from one pass.

    Where the logits need a gradient the same pass leaves that of L, so that its backward reads the
    logits no second time.
    """
    options = (class_weight, label_smoothing, ignore_index)
    if under_transform():
        pair = reference.weighted_cross_entropy(
            logits,
            labels,
            p,
            class_weight=class_weight,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
        )
        found = reference.sample_statistics(logits, labels, ignore_index=ignore_index)
        return *pair, found if statistics else None
    if torch.compiler.is_compiling():
        # the compiler plans memory for itself, and wants no gradient that lives across
        rows, table = _CrossEntropy.apply(logits, labels, *options, statistics)
        losses = _of_samples(rows, logits, labels, ignore_index)
        loss = (p * losses).sum()
    else:
        loss, losses, table = _Weighted.apply(logits, labels, p, *options, statistics)
    if not statistics:
        return loss, losses, None
    columns = [
        reference.mean_of_positions(row.view(labels.shape), labels, ignore_index) for row in table
    ]
    return loss, losses, SampleStatistics(*columns)


def _of_samples(rows: Tensor, logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """Losses of samples [B] in torch's dtype from those of rows [M]."""
    losses = reference.mean_of_positions(rows.view(labels.shape), labels, ignore_index)
    return losses.to(_dtype_of_losses(logits))


def _dtype_of_losses(logits: Tensor) -> torch.dtype:
    """torch's: that of the logits, and float32 under autocast."""
    if torch.is_autocast_enabled(logits.device.type):
        return accumulator(logits.dtype)
    return logits.dtype


def of_positions(per_sample: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """Cotangents of rows [M] from those of samples [B], whose losses are means over positions."""
    if labels.ndim == 1:
        return per_sample
    counted = (labels != ignore_index).sum(1).clamp(min=1)
    return (per_sample / counted)[:, None].expand(labels.shape).reshape(-1)


class _CrossEntropy(torch.autograd.Function):
    """(losses [M], statistics [3, M] or [3, 0]); losses are differentiable twice."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        class_weight: Tensor | None,
        label_smoothing: float,
        ignore_index: int,
        statistics: bool,
    ) -> tuple[Tensor, Tensor]:
        losses, maximum, total, table, _ = torch.ops.mts_fast.cross_entropy_triton(
            logits, labels, class_weight, None, label_smoothing, ignore_index, statistics
        )
        ctx.save_for_backward(logits, labels, class_weight, maximum, total)
        ctx.options = label_smoothing, ignore_index
        ctx.mark_non_differentiable(table)
        return losses, table

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, labels, class_weight, maximum, total = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph
            again = _again(ctx, logits.flatten(0, -2), labels.flatten(), class_weight)
            found = torch.autograd.grad(again, logits, grad.to(again.dtype), create_graph=True)
            return *found, None, None, None, None, None
        gradient = torch.ops.mts_fast.cross_entropy_backward_triton(
            logits, labels, class_weight, maximum, total, grad, *ctx.options
        )
        return gradient.view(logits.shape), None, None, None, None, None


class _Weighted(torch.autograd.Function):
    """(L [], l [B], statistics [3, M] or [3, 0]); L and l are differentiable twice."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        p: Tensor,
        class_weight: Tensor | None,
        label_smoothing: float,
        ignore_index: int,
        statistics: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # the gradient of L, where one will be asked for, is made in the only read of the logits;
        # not in float16, where p times slope would underflow before a loss scale can save it
        cotangent = None
        if ctx.needs_input_grad[0] and logits.dtype != torch.float16:
            cotangent = of_positions(p.to(accumulator(logits.dtype)), labels, ignore_index)
        rows, maximum, total, table, gradient = torch.ops.mts_fast.cross_entropy_triton(
            logits, labels, class_weight, cotangent, label_smoothing, ignore_index, statistics
        )
        losses = reference.mean_of_positions(rows.view(labels.shape), labels, ignore_index)
        loss = (p * losses).sum()
        dtype = _dtype_of_losses(logits)
        loss, losses = loss.to(torch.promote_types(p.dtype, dtype)), losses.to(dtype)
        ctx.save_for_backward(logits, labels, p, class_weight, maximum, total, losses)
        ctx.options = label_smoothing, ignore_index
        ctx.gradient = gradient  # given out once; a second backward makes its own
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(table)
        return loss, losses, table

    @staticmethod
    def backward(
        ctx: Any, grad_loss: Tensor | None, grad_losses: Tensor | None, _: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        logits, labels, p, class_weight, maximum, total, losses = ctx.saved_tensors
        to_logits, to_p = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
        wide = accumulator(logits.dtype)
        along = None  # cotangent of the losses [B]
        if grad_loss is not None:
            along = grad_loss.to(wide) * p.to(wide)
        if grad_losses is not None:
            along = grad_losses.to(wide) if along is None else along + grad_losses
        d_logits = d_p = None
        if torch.is_grad_enabled():  # create_graph
            losses = _again(ctx, logits, labels, class_weight)
            if to_logits and along is not None:
                cotangent = along.to(losses.dtype)
                (d_logits,) = torch.autograd.grad(losses, logits, cotangent, create_graph=True)
        elif to_logits and grad_losses is None and grad_loss is not None and len(ctx.gradient):
            d_logits, ctx.gradient = ctx.gradient.view(logits.shape), ctx.gradient[:0]
            torch.ops.mts_fast.scale_(d_logits, grad_loss)
        elif to_logits and along is not None:
            rows = of_positions(along, labels, ctx.options[1])
            d_logits = torch.ops.mts_fast.cross_entropy_backward_triton(
                logits, labels, class_weight, maximum, total, rows, *ctx.options
            ).view(logits.shape)
        if to_p and grad_loss is not None:
            d_p = (grad_loss * losses).to(p.dtype)
        return d_logits, None, d_p, None, None, None, None


def _again(ctx: Any, logits: Tensor, labels: Tensor, class_weight: Tensor | None) -> Tensor:
    """The losses in plain PyTorch, for a gradient that is itself to be differentiated."""
    label_smoothing, ignore_index = ctx.options
    return reference.cross_entropy(
        logits,
        labels,
        class_weight=class_weight,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
    )
