"""Row 6 by forward mode in fewer passes: what torch computes again or in many pieces.

torch differentiates BatchNorm operator by operator, some 20 passes over the activations; here they
are four. And it repeats the forward beside the tangents: of a convolution's three products one is
that of the training forward, whose result the graph holds anyway where BatchNorm reads it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor

from mts_fast._ambient import FunctionMode

# maps that are linear in their first two arguments together: (input, weight, bias, ...)
LINEAR = {torch.conv1d, torch.conv2d, torch.conv3d, F.linear}


@dataclass
class LinearCall:
    """A call in the training forward."""

    weight: int  # its address
    shape: torch.Size  # of the input
    output: Tensor | None = None  # where BatchNorm keeps it, too
    version: int = 0

    def usable(self, x: Tensor, weight: Tensor) -> Tensor | None:
        """The output, where this is the same call and nothing has written to it since."""
        output = self.output
        if output is None or output._version != self.version or x.shape != self.shape:
            return None
        return output if weight.data_ptr() == self.weight else None


class RecordedOutputs(FunctionMode):
    """Around the training forward: outputs of linear maps that BatchNorm reads in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: deque[LinearCall] = deque()
        self._last: Tensor | None = None
        self._version = 0  # of the last output when it was made

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is F.batch_norm and args and _trains(*args, **kwargs):
            x: Tensor = args[0]
            # an activation in place, or a sum, would be computed again on its own result
            if x is self._last and x._version == self._version and _is_saved(x):
                self.calls[-1].output, self.calls[-1].version = x.detach(), x._version
        result = func(*args, **kwargs)
        if func in LINEAR and len(args) > 1:
            self.calls.append(LinearCall(args[1].data_ptr(), args[0].shape))
            self._last, self._version = result, result._version
        return result

    def __exit__(self, *raised: object) -> None:
        self._last = None
        super().__exit__(*raised)


def _trains(*args: Any, training: bool = False, **_: Any) -> bool:
    """Whether a call of F.batch_norm is one in train mode."""
    return args[5] if len(args) > 5 else training


def _is_saved(x: Tensor) -> bool:
    """Whether autograd keeps it as it is, not under activation checkpointing."""
    return x.requires_grad and torch._C._autograd._top_saved_tensors_default_hooks(True) is None


class FusedTangents(FunctionMode):
    """Around the forward with tangents, with the calls of the training forward where it has run;
    each is dropped once its turn has come."""

    def __init__(self, calls: deque[LinearCall] | None = None) -> None:
        super().__init__()
        self._calls: deque[LinearCall] = deque() if calls is None else calls

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = None
        if func is F.batch_norm:
            result = _batch_norm(*args, **kwargs)
        elif func in LINEAR and len(args) > 1:
            output = self._calls.popleft().usable(args[0], args[1]) if self._calls else None
            if output is not None:
                result = _with_tangent(func, output, *args, **kwargs)
        return func(*args, **kwargs) if result is None else result


def _with_tangent(
    func: Callable[..., Tensor],
    output: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *options: Any,
    **named: Any,
) -> Tensor:
    """func(x, weight, bias) from its output, with its tangent f(x', w) + f(x, w', b')."""
    x, x_t = forward_ad.unpack_dual(x)
    weight, weight_t = forward_ad.unpack_dual(weight)
    bias_t = None if bias is None else forward_ad.unpack_dual(bias).tangent
    parts = []
    if x_t is not None:
        parts.append(func(x_t, weight, None, *options, **named))
    if weight_t is not None:
        parts.append(func(x, weight_t, bias_t, *options, **named))
    elif bias_t is not None:
        shape = [-1] + [1] * (weight.ndim - 2)
        parts.append(bias_t.view(shape).expand_as(output).clone())
    if not parts:
        return output
    tangent = parts[0] if len(parts) == 1 else parts[0].add_(parts[1])
    return forward_ad.make_dual(output, tangent)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    """F.batch_norm; None where torch's own tangent has to do: in eval mode, and in mixed dtypes."""
    if not training or any(t is not None and t.dtype != input.dtype for t in (weight, bias)):
        return None
    if input.numel() <= input.shape[1]:
        return None  # torch's own error
    return _BatchNorm.apply(input, weight, bias, running_mean, running_var, momentum, eps)


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
        # of 16-bit inputs a GPU gives mean and inverse in float32
        factor = weight_t * inverse
        if bias_t is None:
            shift = -factor * mean
        else:
            shift = torch.addcmul(bias_t.to(factor.dtype), factor, mean, value=-1)
        moved = shift.to(x.dtype).view(per_channel)
        if tangent is not None:
            moved = tangent.add_(moved)
        return torch.addcmul(moved, x, factor.to(x.dtype).view(per_channel))
