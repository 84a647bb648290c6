"""Watches a forward: every call that uses a tracked parameter is recorded, or named as unsupported.

It works on function calls, not modules: functional code, tied weights, layers called twice and
attention's packed projections are all seen. What parameters and constants alone are made into
(1 + w, a table indexed by positions) is derived: layers get a leaf in its place, and the graph of
the parameters is kept by itself. A use without a gradient (under torch.no_grad, as in a momentum
encoder) is not recorded: it adds nothing to autograd's gradient.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import BackwardCFunction, FunctionCtx
from torch.autograd.graph import Node

from mts_fast._ambient import FunctionMode
from mts_fast.hypergradient.ghost import layers  # noqa: F401, registers them
from mts_fast.hypergradient.ghost.calls import Call, tensors_in
from mts_fast.hypergradient.ghost.provenance import SPREADS, Origin, Provenance
from mts_fast.hypergradient.ghost.reasons import Reason, Unsupported
from mts_fast.hypergradient.ghost.recorded import RecordedCall
from mts_fast.hypergradient.ghost.routed_rows import RoutedRows
from mts_fast.hypergradient.ghost.rules import LayerCall, rule_of
from mts_fast.hypergradient.ghost.source import Derived, ParameterSource
from mts_fast.hypergradient.ghost.uses import Uses
from mts_fast.hypergradient.ghost.watch import may_mix, move_of

# linear maps of one parameter that move or cast its entries
VIEWS = {
    "t", "transpose", "permute", "view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze",
    "chunk", "split", "unbind", "select", "narrow", "__getitem__", "contiguous", "view_as",
    "to", "float", "double", "bfloat16", "half", "type_as", "T", "mT", "H", "mH",
}  # fmt: skip
GRADIENTS = {torch.autograd.grad, torch.autograd.backward, Tensor.backward}
# functions that read no more than the shape or the dtype of their other tensors
LIKE_OTHERS = {"type_as", "view_as", "expand_as", "reshape_as", "to"}

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

    Args:
        names: parameter -> its dotted path.
        batch_size: B.
        samples: the tensors of the batch.
        constants: tensors that do not change with it, as buffers.
        shared: numbers of the guesses (see `Uses`) that turned out wrong.
        cut: see `Uses`.
    """

    def __init__(
        self,
        names: Mapping[Tensor, str],
        batch_size: int,
        samples: Iterable[Tensor] = (),
        constants: Iterable[Tensor] = (),
        shared: Iterable[int] = (),
        *,
        cut: bool = False,
    ) -> None:
        super().__init__()
        self.names = names
        self.batch_size = batch_size
        self._may_mix_samples = False
        self._shared = frozenset(shared)
        self._uses = Uses(batch_size, self._shared, cut=cut)
        self._moves: list[object] = []
        self._sources: dict[int, ParameterSource | Derived] = {
            id(parameter): ParameterSource(parameter) for parameter in names
        }
        self._derived: list[Derived] = []
        self._alive: list[Any] = []  # an id is unique only while its tensor exists
        self._ranges: set[int] = set()  # ids of the results of torch.arange
        self._provenance = Provenance(batch_size, samples, constants)
        self._routed = RoutedRows(batch_size, self._ranges)
        # autograd functions that were given tracked tensors: paths, and whether samples were, too
        self._functions: dict[FunctionCtx, tuple[set[str], bool]] = {}
        self._adopted: set[FunctionCtx] = set()

    @property
    def recorded(self) -> list[RecordedCall]:
        """Every use, in the order of the forward."""
        return self._uses.recorded

    @property
    def may_mix(self) -> bool:
        """Whether a call might exchange entries of samples, depending on values."""
        return self._may_mix_samples or self._routed.unclear

    @property
    def guesses(self) -> dict[int, int]:
        """Uses that meet samples by the shape of a tensor alone: position -> number."""
        return self._uses.guesses

    @property
    def reasons(self) -> list[str]:
        """Why this forward is not served."""
        inside = [
            Reason(paths, f" is used inside {type(f).__name__.removesuffix('Backward')}")
            for f, (paths, _) in self._functions.items()
            if f not in self._adopted
        ]
        return [*self._uses.reasons, *inside]

    @property
    def derived(self) -> list[Derived]:
        """The derived tensors that layers used."""
        return [d for d in self._derived if d.is_used]

    def roots(self) -> dict[Tensor, frozenset[str]]:
        """Parameters and leaves whose gradients autograd has, and the paths behind them."""
        spread = self._uses.spread
        leaves = {d.leaf: d.paths for d in self.derived if id(d.leaf) not in spread}
        return {p: frozenset((path,)) for p, path in self.names.items()} | leaves

    def end(self, losses: Tensor) -> None:
        """The forward gave these losses [B]."""
        self._routed.end(losses)

    def layout(self) -> Layout:
        """Identifies the forwards for which a check of this one is valid."""
        calls = [(r.call.rule.function if r.call else None, len(r.shape)) for r in self.recorded]
        return (*calls, *self._moves, *sorted(self._shared))

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in PROPERTIES:
            return func(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            return self._attention(args, kwargs)
        call, sources = Call(func, args, kwargs), self._sources
        if self._functions:
            self._adopt(call.tensors)
        if func in GRADIENTS:
            return self._gradients(call)
        tensors = call.tensors[:1] if call.name in LIKE_OTHERS else call.tensors
        used = [t for t in tensors if id(t) in sources]
        if not torch.is_grad_enabled():
            if used:
                self._without_gradient(used, call.tensors)
            return self._run(call)
        used = [t for t in used if t.requires_grad]  # a view made under no_grad is a constant
        if not used:
            self._name_coupling(call)
            return self._run(call)
        if self._meets_samples(call):
            entries = {id(t): sources[id(t)] for t in used}
            return self._uses.run(call, entries, self._paths, self._watch, self._routed)
        return self._derive(call, used)

    def _run(self, call: Call) -> Any:
        """A call without tracked tensors."""
        result = call.run()
        self._watch(call, result)
        made = tensors_in(result)
        if self._provenance.has_to_note(made, call.written):
            untracked = [t for t in call.tensors if id(t) not in self._sources]
            self._provenance.note(call.name, untracked, made, call.written)
        return result

    def _gradients(self, call: Call) -> Any:
        """Gradients inside the forward, of this model or of another: numbers, unless they have a
        graph of their own."""
        why = "the forward takes gradients itself, which the engine cannot follow"
        try:
            result = self._run(call)
        except RuntimeError as error:
            if all(use.in_sum for use in self.recorded):
                raise
            raise Unsupported([why]) from error  # a parameter may be a constant here
        if any(t.requires_grad for t in tensors_in(result)):
            self._uses.reasons.append(why)
        return result

    def _name_coupling(self, call: Call) -> None:
        rule = rule_of(call.function)
        if rule is not None:
            why = rule.couples_samples(LayerCall(rule, call.args, call.kwargs))
            if why is not None:
                self._uses.reasons.append(f"a {rule.function.__name__} without parameters: {why}")

    def _meets_samples(self, call: Call) -> bool:
        """Whether a call of tracked tensors has others that hold samples."""
        tensors = call.tensors[:1] if call.name in LIKE_OTHERS else call.tensors
        others = [t for t in tensors if id(t) not in self._sources and not _picks(call, t)]
        held = [self._provenance.may_hold_samples(t) for t in others]
        if any(holds and not guessed for holds, guessed in held):
            return True
        return any(holds for holds, _ in held) and self._uses.guess()

    def _derive(self, call: Call, used: Sequence[Tensor]) -> Any:
        """A function of parameters and constants: followed as a map where it is a view of one
        parameter, else a derived tensor."""
        first = used[0]
        source = self._sources[id(first)]
        if (
            isinstance(source, ParameterSource)
            and call.name in VIEWS
            and all(t is first or _picks(call, t) for t in call.tensors)
            and call.args
            and call.args[0] is first
        ):
            return self._view(call, source)
        if isinstance(source, ParameterSource) and len(used) == 1:
            layer = self._adjusted_layer(call, first)
            if layer is not None:
                rows = call.run()
                (name,) = layer.sources
                self._track(rows, source.then(lambda t: layer.replay({name: t}), by_rule=True))
                return rows
        entries = [self._sources[id(t)] for t in used]
        paths = frozenset(path for t in used for path in self._paths(t))
        if any(isinstance(e, ParameterSource) and e.by_rule for e in entries):
            text = f": its gradient is scaled by frequency, and {call.name} follows"
            self._uses.reasons.append(Reason(paths, text))
        spread = any(isinstance(e, Derived) and e.spread for e in entries) or any(
            self._provenance.of(t) is Origin.SPREAD
            for t in call.tensors
            if id(t) not in self._sources
        )
        result = call.run()
        made = tensors_in(result)
        untracked = [t for t in call.tensors if id(t) not in self._sources]
        self._provenance.note(call.name, untracked, made, None)
        written = call.written
        if written is None:
            made = [t for t in made if all(t is not u for u in used)]
        elif all(t is not written for t in made):
            made.append(written)
        for t in made:
            if t.requires_grad:
                grown = call.name in SPREADS and t.numel() > first.numel()
                grown = grown and self._provenance.is_spread(t.shape)
                self._track(t, Derived(t, paths, spread=spread or grown))
        return result

    def _adjusted_layer(self, call: Call, parameter: Tensor) -> LayerCall | None:
        """A layer whose gradient torch adjusts in a way that it does not differentiate again."""
        rule = rule_of(call.function)
        if rule is None or rule.adjusts is None:
            return None
        layer = LayerCall(rule, call.args, call.kwargs)
        name = next((n for n in rule.parameters if layer.argument(n) is parameter), None)
        if name is None or not rule.adjusts(layer):
            return None
        layer.sources[name] = ParameterSource(parameter)
        return layer

    def _track(self, tensor: Tensor, entry: ParameterSource | Derived) -> None:
        self._sources[id(tensor)] = entry
        self._alive.append(tensor)
        if isinstance(entry, Derived):
            self._derived.append(entry)

    def _view(self, call: Call, source: ParameterSource) -> Any:
        func, rest, kwargs = call.function, call.args[1:], call.kwargs
        results = call.run()
        several = isinstance(results, tuple | list)
        for i, result in enumerate(results if several else [results]):

            def apply(t: Tensor, i: int = i) -> Tensor:
                image = func(t, *rest, **kwargs)
                return image[i] if several else image

            if result is not call.args[0] and result.requires_grad:
                self._track(result, source.then(apply))
        return results

    def _paths(self, tensor: Tensor) -> Collection[str]:
        entry = self._sources[id(tensor)]
        return entry.paths if isinstance(entry, Derived) else {self.names[entry.root]}

    def _watch(self, call: Call, result: Any) -> None:
        """Note moves of axes, and calls between layers that might exchange entries of samples."""
        if call.function is torch.arange:
            self._ranges.add(id(result))
            self._alive.append(result)
        if self._routed.may_follow(call):
            tracked = [id(t) for t in call.tensors if id(t) in self._sources]
            if self._routed.follow(call, result, tracked):
                return
        changed = call.args[:1] if call.name == "__setitem__" else result
        if not any(t.requires_grad for t in tensors_in(changed)):
            self._watch_inside(call)
            return
        move = move_of(call.name, call.args, call.kwargs)
        if move is not None:
            self._moves.append(move)
        elif not self._may_mix_samples:
            self._may_mix_samples = self._may_mix(call)

    def _watch_inside(self, call: Call) -> None:
        """The same for calls inside an autograd function's forward, whose results have no graph."""
        if (
            not self._may_mix_samples
            and not torch.is_grad_enabled()
            and any(t.requires_grad for t in call.tensors)
            and self._may_mix(call)
        ):
            self._may_mix_samples = _surrounding_function() is not None

    def _may_mix(self, call: Call) -> bool:
        ranges, size = self._ranges, self.batch_size
        return may_mix(call.name, call.args, call.kwargs, size, lambda index: id(index) in ranges)

    def _without_gradient(self, used: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
        """A use under no_grad: of note only in an autograd function with its own backward."""
        function = _surrounding_function()
        if function is None:
            return
        paths, samples = self._functions.get(function, (set(), False))
        paths.update(path for t in used for path in self._paths(t))
        others = (t for t in tensors if id(t) not in self._sources)
        samples = samples or any(self._provenance.may_hold_samples(t)[0] for t in others)
        self._functions[function] = paths, samples

    def _adopt(self, tensors: Iterable[Tensor]) -> None:
        """Results of autograd functions that were given parameters alone are derived tensors."""
        for t in tensors:
            node = t.grad_fn
            if not isinstance(node, BackwardCFunction) or id(t) in self._sources:
                continue
            paths, samples = self._functions.get(node, (set(), True))
            if not samples and self._leads_to_parameters(node):
                self._adopted.add(node)
                self._track(t, Derived(t, frozenset(paths), spread=False))

    def _leads_to_parameters(self, node: Node) -> bool:
        """Whether the graph behind a node has no tensor but tracked ones in it."""
        known = {t.grad_fn for t in self._alive if isinstance(t, Tensor)}
        for following, _ in node.next_functions:
            if following is None or following in known:
                continue
            variable = getattr(following, "variable", None)
            if variable is None or id(variable) not in self._sources:
                return False
        return True

    def _attention(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """nn.MultiheadAttention's function, its inner calls seen by this mode.

        The function passes itself to an active mode by has_torch_function, which is off inside.
        """
        with self, mock.patch.object(F, "has_torch_function", return_value=False):
            return F.multi_head_attention_forward(*args, **kwargs)


def _picks(call: Call, t: Tensor) -> bool:
    """Whether a tensor is the number of one entry, as of an expert: its use is the same for all
    samples."""
    return call.name == "__getitem__" and not t.ndim and not t.is_floating_point()


def _surrounding_function() -> FunctionCtx | None:
    """The context of the autograd function whose forward is running, or None."""
    frame = sys._getframe(1)
    while frame is not None:
        context = frame.f_locals.get("ctx") if frame.f_code.co_name == "forward" else None
        if isinstance(context, FunctionCtx):
            return context
        frame = frame.f_back  # type: ignore[assignment]
    return None
