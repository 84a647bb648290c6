"""Watches a forward: every call that uses a tracked parameter is recorded, or named as unsupported.

It works on function calls, not modules: functional code, tied weights, layers called twice and
attention's packed projections are all seen. A parameter that meets other tensors elementwise (a
position embedding, a class token, a layer scale) is handed on as one copy per sample, whose
gradient is then the per-sample gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from mts_fast.hypergradient.ghost.rules import LayerCall, rule_of

# linear maps of one tensor that only move its entries
VIEWS = {
    "t", "transpose", "permute", "view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze",
    "chunk", "split", "unbind", "select", "narrow", "__getitem__", "contiguous", "view_as",
}  # fmt: skip
ELEMENTWISE = {
    "add", "__add__", "__radd__", "sub", "__sub__", "__rsub__", "mul", "__mul__", "__rmul__",
    "div", "__truediv__", "true_divide", "addcmul",
}  # fmt: skip
# ways to spread a parameter with a leading axis of 1 over the batch
SPREAD = {"expand", "expand_as", "repeat", "cat", "concat"}


class Unsupported(RuntimeError):
    """The ghost engine cannot serve this forward; `reasons` say why."""

    def __init__(self, reasons: Sequence[str]) -> None:
        super().__init__("; ".join(reasons))
        self.reasons = list(reasons)


@dataclass
class Recorded:
    """One recorded use: a layer call, or (call None) a copy per sample of a tracked tensor."""

    call: LayerCall | None
    output: GradientEdge | None
    shape: torch.Size
    tracked: dict[str, Tensor]
    input_version: tuple[Tensor, int] | None = None


@dataclass
class View:
    """A tensor derived from a tracked one by a linear map."""

    source: Tensor
    apply: Callable[[Tensor], Tensor]


class Capture(TorchFunctionMode):
    """Active during one forward of `batch_size` samples."""

    def __init__(self, names: dict[int, str], batch_size: int) -> None:
        super().__init__()
        self.names = names  # id of a parameter -> its dotted path
        self.batch_size = batch_size
        self.recorded: list[Recorded] = []
        self.views: dict[int, View] = {}
        self.reasons: list[str] = []
        self._alive: list[Any] = []  # ids stay unique only while their tensors live

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            return self._attention(args, kwargs)
        used = [t for t in _tensors((args, kwargs)) if self._is_tracked(t)]
        if not used:
            return func(*args, **kwargs)
        rule = rule_of(func)
        if rule is not None:
            return self._layer(LayerCall(rule, args, kwargs), used)
        name = getattr(func, "__name__", str(func))
        if name in VIEWS and len(used) == 1 and args and args[0] is used[0]:
            return self._view(func, args, kwargs)
        if name == "__get__":
            found = func(*args, **kwargs)
            if isinstance(found, Tensor) and found.requires_grad:
                return self._view(func, args, kwargs)
            return found
        spread = self._spread(name, args, used)
        if spread is not None:
            return func(*spread, **kwargs)
        result = func(*args, **kwargs)
        if any(t.requires_grad for t in _tensors(result)):
            paths = ", ".join(sorted({self._path(t) for t in used}))
            self.reasons.append(f"{paths} is used by {name}, which the engine cannot replay")
        return result

    def _is_tracked(self, tensor: Tensor) -> bool:
        return id(tensor) in self.names or id(tensor) in self.views

    def _path(self, tensor: Tensor) -> str:
        while id(tensor) in self.views:
            tensor = self.views[id(tensor)].source
        return self.names[id(tensor)]

    def _layer(self, call: LayerCall, used: list[Tensor]) -> Tensor:
        for name in call.rule.parameters:
            value = call.argument(name)
            if isinstance(value, Tensor) and self._is_tracked(value):
                call.tracked[name] = value
        path = self._path(used[0])
        if len({id(t) for t in call.tracked.values()}) < len({id(t) for t in used}):
            self.reasons.append(f"{path} is an input of {call.rule.function.__name__}")
        why = call.rule.couples_samples(call)
        if why is not None:
            self.reasons.append(f"{path.rpartition('.')[0] or path}: {why}")
        y = call.rule.function(*call.args, **call.kwargs)
        if not y.requires_grad:
            self.reasons.append(f"{path} is used under torch.no_grad or reentrant checkpointing")
            return y
        if y._is_view():
            # an in-place activation on a view would cut this node out of the graph.
            y = torch.ops.aten._unsafe_view(y, y.shape)
        a = call.args[0]
        self.recorded.append(
            Recorded(call, get_gradient_edge(y), y.shape, call.tracked, (a, a._version))
        )
        return y

    def _view(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        source, rest = args[0], args[1:]
        results = func(*args, **kwargs)
        several = isinstance(results, tuple | list)
        for i, result in enumerate(results if several else [results]):

            def apply(t: Tensor, i: int = i) -> Tensor:
                found = func(t, *rest, **kwargs)
                return found[i] if several else found

            self.views[id(result)] = View(source, apply)
            self._alive.append(result)
        return results

    def _spread(self, name: str, args: tuple[Any, ...], used: list[Tensor]) -> list[Any] | None:
        """Arguments with the tracked tensors replaced by one copy per sample, or None."""
        shape_of: dict[int, list[int]] = {}
        others = [t for t in _tensors(args) if not self._is_tracked(t)]
        for t in used:
            if name in ELEMENTWISE:
                x = max(others, key=lambda o: o.ndim, default=None)
                if x is None or x.ndim == 0 or x.shape[0] != self.batch_size:
                    return None
                if x.ndim > t.ndim:
                    shape = [self.batch_size] + [1] * (x.ndim - t.ndim - 1) + list(t.shape)
                elif x.ndim == t.ndim and t.shape[0] == 1:
                    shape = [self.batch_size, *t.shape[1:]]
                else:
                    return None
            elif name in SPREAD and t.ndim > 1 and t.shape[0] == 1:
                shape = [self.batch_size, *t.shape[1:]]
            else:
                return None
            shape_of[id(t)] = shape

        def swap(value: Any) -> Any:
            if isinstance(value, Tensor) and id(value) in shape_of:
                return self._copy_per_sample(value, shape_of[id(value)])
            if isinstance(value, tuple | list):
                return type(value)(swap(v) for v in value)
            return value

        swapped = [swap(a) for a in args]
        if name == "repeat" and swapped[1] == self.batch_size:
            swapped[1] = 1  # the copies already are one per sample
        return swapped

    def _copy_per_sample(self, tracked: Tensor, shape: list[int]) -> Tensor:
        source = tracked.detach()
        if source.ndim == len(shape):
            copies = source.expand(shape)
        else:
            ones = [1] * (len(shape) - source.ndim)
            copies = source.reshape([*ones, *source.shape]).expand(shape)
        copies = copies.clone().requires_grad_()
        self.recorded.append(
            Recorded(None, get_gradient_edge(copies), copies.shape, {"value": tracked})
        )
        self._alive.append(copies)
        return copies

    def _attention(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """nn.MultiheadAttention's function, its inner calls seen by this mode.

        The function hands itself to the mode whenever one is active; inside, that is switched off.
        """
        with self, mock.patch.object(F, "has_torch_function", return_value=False):
            return F.multi_head_attention_forward(*args, **kwargs)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, tuple | list):
        return [t for v in value for t in _tensors(v)]
    return []
