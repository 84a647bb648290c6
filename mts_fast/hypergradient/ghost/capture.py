"""Watches a forward: every call that uses a tracked parameter is recorded, or named as unsupported.

It works on function calls, not modules: functional code, tied weights, layers called twice and
attention's packed projections are all seen. A parameter that meets other tensors elementwise (a
position embedding, a class token, a layer scale) is passed on as one copy per sample, whose
gradient is then the per-sample gradient. A use without a gradient (under torch.no_grad, as in a
momentum encoder) is not recorded: it adds nothing to autograd's gradient.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.autograd.graph import get_gradient_edge

from mts_fast._ambient import FunctionMode
from mts_fast.hypergradient.ghost import layers  # noqa: F401, registers them
from mts_fast.hypergradient.ghost.recorded import RecordedCall
from mts_fast.hypergradient.ghost.rules import LayerCall, rule_of
from mts_fast.hypergradient.ghost.source import ParameterSource
from mts_fast.hypergradient.ghost.watch import may_mix, move_of, plain_name

# linear maps of one tensor that move or cast its entries
VIEWS = {
    "t", "transpose", "permute", "view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze",
    "chunk", "split", "unbind", "select", "narrow", "__getitem__", "contiguous", "view_as",
    "to", "float", "double", "bfloat16", "half", "type_as",
}  # fmt: skip
ELEMENTWISE = {
    "add", "__add__", "__radd__", "sub", "__sub__", "__rsub__", "mul", "__mul__", "__rmul__",
    "div", "__truediv__", "true_divide", "addcmul",
}  # fmt: skip
# ways to spread a parameter with a leading axis of 1 over the batch
SPREAD = {"expand", "expand_as", "repeat"}

# what a tensor tells of itself without its values or a view
PROPERTIES = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout")),
    *(getattr(Tensor, name).__get__ for name in ("requires_grad", "is_cuda", "is_leaf")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.__len__),
    *(Tensor.is_contiguous, Tensor.is_floating_point, Tensor.element_size),
}


# identifies a forward: its recorded calls, and the order in which axes were moved
Layout = tuple[object, ...]


class Capture(FunctionMode):
    """Active during one forward of `batch_size` samples.

    Embedding calls are numbered from 0. `shared_rows` holds the numbers of those whose index of B
    entries holds positions, which all samples share, and not one entry per sample.
    """

    def __init__(
        self,
        names: Mapping[Tensor, str],
        batch_size: int,
        shared_rows: Iterable[int] = (),
    ) -> None:
        super().__init__()
        self.names = names  # parameter -> its dotted path
        self.batch_size = batch_size
        self.recorded: list[RecordedCall] = []
        self.reasons: list[str] = []
        # whether a call might exchange entries of samples, depending on values
        self.may_mix = False
        # of embeddings whose index could be either: position in `recorded` -> number of the call
        self.ambiguous_rows: dict[int, int] = {}
        self._shared_turns = set(shared_rows)
        self._embeddings = 0
        self._moves: list[object] = []
        self._sources = {id(parameter): ParameterSource(parameter) for parameter in names}
        self._alive: list[Any] = []  # an id is unique only while its tensor exists
        self._ranges: set[int] = set()  # ids of the results of torch.arange

    def layout(self) -> Layout:
        """Identifies the forwards for which a check of this one is valid."""
        calls = [(r.call.rule.function if r.call else None, len(r.shape)) for r in self.recorded]
        return (*calls, *self._moves, *sorted(self._shared_turns))

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in PROPERTIES:
            return func(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            return self._attention(args, kwargs)
        sources = self._sources
        used = [t for t in _tensors(args, kwargs) if id(t) in sources]
        if torch.is_grad_enabled():  # a view made under no_grad is a constant
            used = [t for t in used if t.requires_grad]
        rule = rule_of(func)
        if rule is not None:
            y = self._layer(LayerCall(rule, args, kwargs), used)
            if not used:
                self._watch(func, args, kwargs, y)
            return y
        if not used:
            result = func(*args, **kwargs)
            self._watch(func, args, kwargs, result)
            return result
        name = getattr(func, "__name__", str(func))
        if name in VIEWS and len(used) == 1 and args and args[0] is used[0]:
            return self._view(func, args, kwargs)
        if name == "__get__":
            result = func(*args, **kwargs)
            if isinstance(result, Tensor) and result.requires_grad:
                return self._view(func, args, kwargs)
            return result
        spread = self._spread(name, args, used)
        if spread is not None:
            return func(*spread, **kwargs)
        result = func(*args, **kwargs)
        paths = ", ".join(sorted({self._path(t) for t in used}))
        if any(t.requires_grad for t in _tensors(result)):
            self.reasons.append(f"{paths} is used by {name}, which the engine cannot replay")
        elif _tensors(result):
            self._without_gradient(paths)
        return result

    def _watch(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        """Note moves of axes, and calls between layers that might exchange entries of samples."""
        if func is torch.arange:
            self._ranges.add(id(result))
            self._alive.append(result)
        name = plain_name(func)
        changed = args[:1] if name == "__setitem__" else result
        if not any(t.requires_grad for t in _tensors(changed)):
            self._watch_inside(name, args, kwargs)
            return
        move = move_of(name, args, kwargs)
        if move is not None:
            self._moves.append(move)
        elif not self.may_mix:
            self.may_mix = self._may_mix(name, args, kwargs)

    def _watch_inside(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The same for calls inside an autograd function's forward, whose results have no graph."""
        if (
            not self.may_mix
            and not torch.is_grad_enabled()
            and any(t.requires_grad for t in _tensors(args, kwargs))
            and self._may_mix(name, args, kwargs)
        ):
            self.may_mix = _surrounding_function() is not None

    def _may_mix(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        size = self.batch_size
        return may_mix(name, args, kwargs, size, lambda index: id(index) in self._ranges)

    def _without_gradient(self, paths: str) -> None:
        """A use under no_grad: unsupported only in an autograd function with its own backward."""
        if torch.is_grad_enabled():
            return
        function = _surrounding_function()
        if function is None:
            return
        name = type(function).__name__.removesuffix("Backward")
        self.reasons.append(f"{paths} is used inside {name}")

    def _path(self, tensor: Tensor) -> str:
        return self.names[self._sources[id(tensor)].parameter]

    def _layer(self, call: LayerCall, used: list[Tensor]) -> Tensor:
        function = call.rule.function
        path = self._path(used[0]) if used else f"a {function.__name__} without parameters"
        why = call.rule.couples_samples(call)
        if why is not None:
            self.reasons.append(f"{path.rpartition('.')[0] or path}: {why}")
        shared = False
        if call.rule.indexed and used:
            shared = self._serves_all_samples(call)
        if shared:
            return self._shared_rows(call, used[0])
        y = function(*call.args, **call.kwargs)
        if not used:
            return y
        for name in call.rule.parameters:
            argument = call.argument(name)
            if any(argument is t for t in used):
                call.sources[name] = self._sources[id(argument)]
        if not y.requires_grad:
            self._without_gradient(path)
            return y
        held = {id(call.argument(name)) for name in call.sources}
        if any(id(t) not in held for t in used):
            self.reasons.append(f"{path} is an input of {function.__name__}")
            return y
        why = call.unsupported()
        if why is not None:
            self.reasons.append(f"{path}: {why}")
            return y
        if y._is_view():
            # an in-place activation on a view would cut this node out of the graph
            y = torch.ops.aten._unsafe_view(y, y.shape)
        a = call.input
        edge = get_gradient_edge(y)
        if call.rule.indexed and a.shape == (self.batch_size,):
            self.ambiguous_rows[len(self.recorded)] = self._embeddings - 1
        self.recorded.append(
            RecordedCall(call, call.sources, edge, y.shape, path, _input=(a, a._version))
        )
        return y

    def _serves_all_samples(self, call: LayerCall) -> bool:
        """Whether an embedding's index holds positions that all samples share."""
        turn, shape = self._embeddings, call.input.shape
        self._embeddings += 1
        if shape[:1] != (self.batch_size,):
            return True
        return len(shape) == 1 and turn in self._shared_turns

    def _shared_rows(self, call: LayerCall, table: Tensor) -> Tensor:
        """The rows that serve all samples, tracked as a view of the table."""
        rows = call.run({})
        (name,) = call.rule.parameters
        source = call.sources[name] = self._sources[id(table)]
        why = call.unsupported()
        if why is not None:
            self.reasons.append(f"{self._path(table)}: {why}")
        self._sources[id(rows)] = source.then(lambda t: call.replay({name: t}))
        self._alive.append(rows)
        return rows

    def _view(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        source, rest = self._sources[id(args[0])], args[1:]
        results = func(*args, **kwargs)
        several = isinstance(results, tuple | list)
        for i, result in enumerate(results if several else [results]):

            def apply(t: Tensor, i: int = i) -> Tensor:
                image = func(t, *rest, **kwargs)
                return image[i] if several else image

            if result is not args[0]:
                self._sources[id(result)] = source.then(apply)
                self._alive.append(result)
        return results

    def _spread(self, name: str, args: tuple[Any, ...], used: list[Tensor]) -> list[Any] | None:
        """Arguments with the tracked tensors replaced by one copy per sample, or None."""
        shape_of: dict[int, list[int]] = {}
        others = [t for t in _tensors(args) if id(t) not in self._sources]
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
            elif t.ndim > 1 and t.shape[0] == 1 and self._spreads_over_batch(name, args):
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
        if name == "repeat":  # there already is one copy per sample
            times = swapped[1:] if isinstance(swapped[1], int) else list(swapped[1])
            swapped[1:] = [1, *times[1:]]
        return swapped

    def _spreads_over_batch(self, name: str, args: tuple[Any, ...]) -> bool:
        """Whether a call makes one copy per sample along the first axis."""
        if name not in SPREAD or len(args) < 2:
            return False
        first = args[1]
        if isinstance(first, Tensor):
            first = first.shape
        return (first if isinstance(first, int) else first[0]) == self.batch_size

    def _copy_per_sample(self, used: Tensor, shape: list[int]) -> Tensor:
        value = used.detach()
        ones = [1] * (len(shape) - value.ndim)
        copies = value.reshape([*ones, *value.shape]).expand(shape).clone().requires_grad_()
        sources = {"value": self._sources[id(used)]}
        edge = get_gradient_edge(copies)
        self.recorded.append(
            RecordedCall(None, sources, edge, copies.shape, self._path(used), value=value)
        )
        self._alive.append(copies)
        return copies

    def _attention(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """nn.MultiheadAttention's function, its inner calls seen by this mode.

        The function passes itself to an active mode by has_torch_function, which is off inside.
        """
        with self, mock.patch.object(F, "has_torch_function", return_value=False):
            return F.multi_head_attention_forward(*args, **kwargs)


def _surrounding_function() -> FunctionCtx | None:
    """The context of the autograd function whose forward is running, or None."""
    frame = sys._getframe(1)
    while frame is not None:
        context = frame.f_locals.get("ctx") if frame.f_code.co_name == "forward" else None
        if isinstance(context, FunctionCtx):
            return context
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _tensors(value: Any, named: Mapping[str, Any] | None = None) -> list[Tensor]:
    """All tensors in a nest, and in another one by name."""
    if isinstance(value, Tensor):
        return [value]
    tensors: list[Tensor] = []
    todo = [value]
    if named:
        todo.append(named)
    while todo:
        nest = todo.pop(0)
        if isinstance(nest, dict):
            nest = nest.values()
        elif not isinstance(nest, tuple | list):
            continue
        for entry in nest:
            if isinstance(entry, Tensor):
                tensors.append(entry)
            elif isinstance(entry, tuple | list | dict):
                todo.append(entry)
    return tensors
