"""Row 6 by forward mode in fewer passes: what torch computes again or in many pieces.

torch differentiates BatchNorm operator by operator, some 20 passes over the activations; here they
are four. And it repeats the forward beside the tangents: of a convolution's three products one is
that of the training forward, whose result the graph holds anyway where BatchNorm reads it, and so
are results of ReLUs.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor

from mts_fast._ambient import FunctionMode
from mts_fast.hypergradient.ghost.watch import writes_in_place
from mts_fast.hypergradient.nests import leaves
from mts_fast.hypergradient.training_forward import (
    LINEAR,
    RECTIFIERS,
    BatchStatistics,
    Calls,
    ForwardCall,
    makes_rectified,
    under_functorch,
)

# w' x_hat + b' of a BatchNorm as factor x + shift, [C] each
Affine = tuple[Tensor, Tensor]


class GraphWritten(BaseException):
    """The forward with tangents is about to write to a result of the training forward, which did
    not: it has to run without those. No code of a model may take it for an error of its own."""


class FusedTangents(FunctionMode):
    """Around the forward with tangents.

    Args:
        calls: those of the training forward where it has run; each is dropped once its turn has
            come, and all of them from the first one on that is not made again.
        tangents: those of the parameters, by the address of the parameter.
        counters: ids of numbers that forwards count in (BatchNorm's `num_batches_tracked`): nothing
            is added to one until something reads it.
    """

    def __init__(
        self,
        calls: deque[ForwardCall] | None = None,
        tangents: Mapping[int, Tensor] | None = None,
        counters: Iterable[int] = (),
    ) -> None:
        super().__init__()
        self._calls: deque[ForwardCall] = deque() if calls is None else calls
        self._affine = _affine_maps(self._calls, tangents or {})
        self._counters = set(counters)
        self._to_add: dict[int, int] = {}
        self._order = Calls()
        self._shared: set[int] = set()  # addresses of the memory of results that were taken

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if under_functorch():
            return func(*args, **kwargs)
        if self._order.copies_input(func, args):
            return self._order.copied(func(*args, **kwargs))
        before = self._same_call(func, args, kwargs)
        if before is None and self._shared and self._may_write(func, args, kwargs):
            raise GraphWritten
        result = self._run(func, args, kwargs, before)
        if self._calls and self._order.note(result):
            if before is None:
                self._calls.clear()
            else:
                self._calls.popleft()
        return result

    def _same_call(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> ForwardCall | None:
        """The next call of the training forward, where this is the same."""
        if not self._calls or self._calls[0].key != self._order.key(func, args, kwargs):
            return None
        return self._calls[0]

    def _may_write(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> bool:
        """Whether a call may write to the memory of a result that was taken."""
        flags = True in (a for a in args if type(a) is bool) or kwargs.get("inplace")
        if not (flags or writes_in_place(func) or "out" in kwargs):
            return False
        written = leaves((args[:1], kwargs.get("out")))
        return any(t.untyped_storage().data_ptr() in self._shared for t in written)

    def _run(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        before: ForwardCall | None,
    ) -> Any:
        if self._counters and self._counts(func, args, kwargs):
            return args[0]
        result = None
        if func is F.batch_norm:
            affine = None if before is None else self._affine.get(id(before.statistics))
            result = _batch_norm(*args, affine=affine, **kwargs)
        elif func in LINEAR and len(args) > 1:
            if before is not None and before.has_weight(args[1]):
                output = self._taken(before)
                result = None if output is None else _with_tangent(func, output, *args, **kwargs)
        elif func in RECTIFIERS and args:
            if not makes_rectified(func, *args, **kwargs):
                result = _rectify(args[0])
            elif before is not None and (output := self._taken(before)) is not None:
                result = _rectified(args[0], output)
        return func(*args, **kwargs) if result is None else result

    def _taken(self, call: ForwardCall) -> Tensor | None:
        """The result of the training forward, where it is known."""
        result = call.known()
        if result is not None:
            self._shared.add(result.untyped_storage().data_ptr())
        return result

    def _counts(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> bool:
        """Whether the call adds to a counter, which then waits. Any other call that has a counter
        finds it as it has to be, and may have made a view of it: it waits no more."""
        adds = func is Tensor.add_ and id(args[0]) in self._counters and not kwargs
        if adds and type(args[1]) is int:
            self._to_add[id(args[0])] = self._to_add.get(id(args[0]), 0) + args[1]
            return True
        for t in leaves((args, kwargs)):
            if id(t) in self._counters:
                self._counters.remove(id(t))
                t.add_(self._to_add.pop(id(t), 0))
        return False


def _affine_maps(calls: Iterable[ForwardCall], tangents: Mapping[int, Tensor]) -> dict[int, Affine]:
    """factor = w' / deviation and shift = b' - factor mean of every BatchNorm whose statistics are
    known, by their id; a few launches for all."""
    kinds: dict[object, list[BatchStatistics]] = defaultdict(list)
    for call in calls:
        s = call.statistics
        if s is None or s.weight not in tangents or s.bias not in tangents:
            continue
        # a view that begins where a parameter does has its address, too
        if tangents[s.weight].shape == tangents[s.bias].shape == s.mean.shape:
            kinds[s.mean.dtype, s.mean.device].append(s)
    maps: dict[int, Affine] = {}
    for alike in kinds.values():
        weights, biases = [tangents[s.weight] for s in alike], [tangents[s.bias] for s in alike]
        factors = torch._foreach_mul(weights, [s.inverse for s in alike])
        shifts = torch._foreach_addcmul(biases, factors, [s.mean for s in alike], value=-1)
        pairs = zip(factors, shifts, strict=True)
        maps |= {id(s): pair for s, pair in zip(alike, pairs, strict=True)}
    return maps


def _rectified(x: Tensor, output: Tensor) -> Tensor:
    """The known max(x, 0), with its tangent: that of x where it is positive."""
    tangent = forward_ad.unpack_dual(x).tangent
    if tangent is None:
        return output
    return forward_ad.make_dual(output, torch.ops.aten.threshold_backward(tangent, output, 0))


def _rectify(x: Tensor) -> Tensor | None:
    """max(x, 0) in place, with its tangent; torch makes that in new memory and copies it."""
    primal, tangent = forward_ad.unpack_dual(x)
    if tangent is None:
        return None
    primal.relu_()
    torch.ops.aten.threshold_backward.grad_input(tangent, primal, 0, grad_input=tangent)
    return x


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
    *,
    affine: Affine | None = None,
) -> Tensor | None:
    """F.batch_norm; None where torch's own tangent has to do: in eval mode, and in mixed dtypes.

    affine: what the tangents of weight and bias add, where it is known.
    """
    if not training or any(t is not None and t.dtype != input.dtype for t in (weight, bias)):
        return None
    if input.numel() <= input.shape[1]:
        return None  # torch's own error
    return _BatchNorm.apply(input, weight, bias, running_mean, running_var, momentum, eps, affine)


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
        affine: Affine | None,
    ) -> Tensor:
        y, mean, inverse = torch.ops.aten.native_batch_norm(
            x, weight, bias, running_mean, running_var, True, momentum, eps
        )
        ctx.set_materialize_grads(False)
        ctx.save_for_forward(x, weight, mean, inverse)
        ctx.eps, ctx.affine = eps, affine
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
        if ctx.affine is not None and weight_t is not None and bias_t is not None:
            factor, shift = (t.view([1, -1] + [1] * (x.ndim - 2)) for t in ctx.affine)
            if tangent is None:
                return torch.addcmul(shift, x, factor)
            return tangent.add_(shift).addcmul_(x, factor)
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
