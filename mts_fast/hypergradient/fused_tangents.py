"""Tangents of layers in few passes, where torch's forward mode takes many.

torch differentiates BatchNorm operator by operator, about 20 passes over the activations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mts_fast._ambient import FunctionMode


class FusedTangents(FunctionMode):
    """Inside, BatchNorm in train mode has its tangent by `_BatchNorm`."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm:
            fused = _batch_norm(*args, **kwargs)
            if fused is not None:
                return fused
        return func(*args, **kwargs)


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    """F.batch_norm; None where torch's own tangent has to do: in eval mode, and in mixed dtypes."""
    if not training or any(t is not None and t.dtype != x.dtype for t in (weight, bias)):
        return None
    if x.numel() <= x.shape[1]:
        return None  # torch's own error
    return _BatchNorm.apply(x, weight, bias, running_mean, running_var, momentum, eps)


class _BatchNorm(torch.autograd.Function):
    """y = w x_hat + b with x_hat = (x - m) r of the batch.

    The map from the tangent of x to that of y is symmetric, so that it is torch's backward of this
    layer, one pass: w r (t - mean(t) - x_hat mean(x_hat t)). To it come w' x_hat + b'.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
    ) -> Tensor:
        y, mean, inverse = torch.ops.aten.native_batch_norm(
            x, weight, bias, running_mean, running_var, True, momentum, eps
        )
        ctx.set_materialize_grads(False)
        ctx.save_for_forward(x, weight, mean, inverse)
        ctx.eps = eps
        return y

    @staticmethod
    def jvp(
        ctx: Any, x_t: Tensor | None, weight_t: Tensor | None, bias_t: Tensor | None, *_: None
    ) -> Tensor | None:
        x, weight, mean, inverse = ctx.saved_tensors
        tangent = None
        if x_t is not None:
            tangent = torch.ops.aten.native_batch_norm_backward(
                *(x_t, x, weight, None, None, mean, inverse, True, ctx.eps),
                [True, False, False],
            )[0]
        if weight_t is None and bias_t is None:
            return tangent
        per_channel = [1, -1] + [1] * (x.ndim - 2)
        if weight_t is None:
            assert bias_t is not None
            shift = bias_t.view(per_channel)
            return shift.expand_as(x).clone() if tangent is None else tangent.add_(shift)
        factor = weight_t * inverse
        shift = -factor * mean if bias_t is None else torch.addcmul(bias_t, factor, mean, value=-1)
        moved = shift.view(per_channel)
        if tangent is not None:
            moved = tangent.add_(moved)
        return torch.addcmul(moved, x, factor.view(per_channel))
