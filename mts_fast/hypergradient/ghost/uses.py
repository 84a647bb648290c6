"""Calls in which parameters, or what was derived from them, meet samples: run, and recorded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from mts_fast.hypergradient.ghost.calls import Call, tensors_in
from mts_fast.hypergradient.ghost.function_call import FunctionCall
from mts_fast.hypergradient.ghost.layers.elementwise import elementwise_call
from mts_fast.hypergradient.ghost.reasons import Reason
from mts_fast.hypergradient.ghost.recorded import RecordedCall
from mts_fast.hypergradient.ghost.routed_rows import RoutedRows
from mts_fast.hypergradient.ghost.rules import LayerCall, rule_of
from mts_fast.hypergradient.ghost.source import Derived, ParameterSource

# functions that draw random numbers, or that torch does not differentiate by themselves
RANDOM = {
    "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout",
    "feature_alpha_dropout", "rrelu", "gumbel_softmax", "bernoulli", "normal", "multinomial",
    "fractional_max_pool2d", "fractional_max_pool3d", "lstm", "gru", "rnn_tanh", "rnn_relu",
}  # fmt: skip


class Uses:
    """Every use of a forward, and why some cannot be served.

    Args:
        size: B.
        shared: numbers of the guesses that turned out wrong.
        cut: whether autograd's gradient may leave out uses whose gradient follows from b at the
            price that it would have for autograd.
    """

    def __init__(self, size: int, shared: Collection[int], *, cut: bool) -> None:
        self.size = size
        self.recorded: list[RecordedCall] = []
        self.reasons: list[str] = []  # those that concern some parameters are `Reason`
        # uses whose tensors hold samples by their shape alone: position in `recorded` -> number
        self.guesses: dict[int, int] = {}
        self.spread: set[int] = set()  # ids of the leaves that have entries for every sample
        self._shared = shared
        self._guessed = 0
        self._cut = cut

    def guess(self) -> bool:
        """Whether the next use may be taken for one that meets samples."""
        number = self._guessed
        self._guessed += 1
        if number in self._shared:
            return False
        self.guesses[len(self.recorded)] = number
        return True

    def run(
        self,
        call: Call,
        entries: Mapping[int, ParameterSource | Derived],
        path_of: Callable[[Tensor], Collection[str]],
        watch: Callable[[Call, Any], None],
        routed: RoutedRows,
    ) -> Any:
        """Run a call with tracked tensors, which `entries` has by id, and record it.

        `path_of` names a tensor; `watch` sees calls that have no rule, and their results; `routed`
        follows rows that an index gathered.
        """
        used = [t for t in call.tensors if id(t) in entries]
        paths = frozenset(path for t in used for path in path_of(t))
        path = ", ".join(sorted(path_of(used[0])))
        twins: dict[int, Tensor] = {}
        tracked: dict[int, ParameterSource] = {}
        for t in used:
            self._enter(entries[id(t)], t, twins, tracked)
        call = call.with_others(twins)
        written = call.written
        if written is not None and (id(written) in tracked or id(written) in self.spread):
            text = f" is changed in place by samples in {call.name}"
            self.reasons.append(Reason(paths, text, path))
            return Call(
                call.function, (written.detach().clone(), *call.args[1:]), call.kwargs
            ).run()
        others = [t for t in call.tensors if id(t) not in tracked]
        is_first = not any(t.requires_grad for t in others)  # before something is written to them
        if not tracked:
            result = call.run()
            watch(call, result)
            return result
        layer = self._layer(call, tracked, path)
        if layer is not None:
            return self._record(
                call, layer, tracked, paths, path, call.run(), routed, is_first=is_first
            )
        layer = self._elementwise(call, tracked)
        if layer is not None:
            x = next(t for t in call.tensors if id(t) not in tracked)
            runs, in_sum = call, True
            if self._cut and x.requires_grad and call.written is None and not _is_packed():
                constants = {id(t): t.detach() for t in call.tensors if id(t) in tracked}
                runs, in_sum = call.with_others(constants), False
            return self._record(
                call,
                layer,
                tracked,
                paths,
                path,
                runs.run(),
                routed,
                is_first=is_first,
                in_sum=in_sum,
            )
        call = self._with_masks_per_sample(call, tracked, paths, path)
        if not any(id(t) in tracked for t in call.tensors):
            result = call.run()
            watch(call, result)
            return result
        result = call.run()
        watch(call, result)
        why = self._no_function(call, result)
        if why is not None:
            self.reasons.append(Reason(paths, f" {why}"))
            return result
        if not isinstance(result, Tensor) or not result.requires_grad:
            return result
        layer = FunctionCall.of(call, tracked)
        return self._record(call, layer, tracked, paths, path, result, routed, is_first=is_first)

    def _enter(
        self,
        entry: ParameterSource | Derived,
        used: Tensor,
        twins: dict[int, Tensor],
        tracked: dict[int, ParameterSource],
    ) -> None:
        """What the function gets for a tracked tensor, and whether it is a use of it."""
        if isinstance(entry, ParameterSource):
            tracked[id(used)] = entry
            return
        leaf = twins[id(used)] = entry.leaf
        source = ParameterSource(leaf)
        if id(leaf) in self.spread:
            return
        if not entry.spread or not self.guess():
            entry.spread = False
            tracked[id(leaf)] = source
            return
        self.spread.add(id(leaf))
        edge = get_gradient_edge(leaf)
        self.recorded.append(
            RecordedCall(
                None, {"value": source}, edge, leaf.shape, entry.path, entry.paths, in_sum=False
            )
        )

    def _layer(
        self, call: Call, tracked: Mapping[int, ParameterSource], path: str
    ) -> LayerCall | None:
        """The call by a rule, where all that is tracked stands at the rule's parameters."""
        rule = rule_of(call.function)
        if rule is None:
            return None
        layer = LayerCall(rule, call.args, call.kwargs)
        why = rule.couples_samples(layer)
        if why is not None:
            self.reasons.append(f"{path.rpartition('.')[0] or path}: {why}")
        for name in rule.parameters:
            source = tracked.get(id(layer.argument(name)))
            if source is not None:
                layer.sources[name] = source
        held = {id(layer.argument(name)) for name in layer.sources}
        return layer if held >= tracked.keys() else None

    def _elementwise(self, call: Call, tracked: Mapping[int, ParameterSource]) -> LayerCall | None:
        if len(tracked) > 1 or len(call.tensors) != 2:
            return None
        position = next((i for i, a in enumerate(call.args) if id(a) in tracked), None)
        if position is None:
            return None
        source = next(iter(tracked.values()))
        layer = elementwise_call(call.name, call.args, call.kwargs, position, source, self.size)
        overwritten = call.written is not None and layer is not None and layer.rule.reads_input
        return None if overwritten else layer

    def _with_masks_per_sample(
        self,
        call: Call,
        tracked: Mapping[int, ParameterSource],
        paths: frozenset[str],
        path: str,
    ) -> Call:
        """Attention whose mask is made of parameters gets one for every sample: its backward has
        their gradients before they are summed."""
        mask = call.kwargs.get("attn_mask")
        if call.name != "scaled_dot_product_attention" or not isinstance(mask, Tensor):
            return call
        shape = (self.size, *mask.shape[1:])
        if (
            id(mask) not in tracked
            or mask.ndim != 4
            or mask.shape[0] != 1
            or call.args[0].shape[:1] != (self.size,)
        ):
            return call
        copies = mask.detach().expand(shape).requires_grad_()
        source = tracked[id(mask)].then(lambda t: t.expand(shape))
        self.recorded.append(
            RecordedCall(
                None,
                {"value": source},
                get_gradient_edge(copies),
                copies.shape,
                path,
                paths,
                in_sum=False,
            )
        )
        return call.with_others({id(mask): copies})

    def _no_function(self, call: Call, result: Any) -> str | None:
        """Why a call without a rule cannot be run again for its derivatives."""
        name = call.name
        if name in RANDOM or (
            name == "scaled_dot_product_attention" and call.kwargs.get("dropout_p", 0)
        ):
            return f"is used by {name}, which cannot be run again"
        if call.written is not None and call.written.requires_grad:
            return f"is used by {name} in place, which the engine cannot replay"
        if not isinstance(result, Tensor) and any(t.requires_grad for t in tensors_in(result)):
            return f"is used by {name}, which the engine cannot replay"
        return None

    def _record(
        self,
        call: Call,
        layer: LayerCall,
        tracked: Mapping[int, ParameterSource],
        paths: frozenset[str],
        path: str,
        y: Tensor,
        routed: RoutedRows,
        *,
        is_first: bool,
        in_sum: bool = True,
    ) -> Tensor:
        if not y.requires_grad:
            return y
        why = layer.unsupported()
        if y.is_complex() or any(t.is_complex() for t in call.tensors):
            why = "its use has complex numbers"
        elif call.written is not None and y._is_view():
            # the base goes on by another node than this one
            why = f"its {call.name} writes to a view"
        if why is not None:
            self.reasons.append(Reason(paths, f": {why}", path))
            return y
        if y._is_view():
            # an in-place activation on a view would cut this node out of the graph
            y = torch.ops.aten._unsafe_view(y, y.shape)
        rows = None
        if routed.may_follow(call):
            routed.follow(call, y, tracked.keys())
            rows = routed.of(y)
        others = [t for t in call.tensors if id(t) not in tracked]
        read = others if layer.rule.reads_input else []
        self.recorded.append(
            RecordedCall(
                layer,
                layer.sources,
                get_gradient_edge(y),
                y.shape,
                path,
                paths,
                is_first=is_first,
                in_sum=in_sum,
                rows=rows[0] if rows is not None and rows[1] == 0 else None,
                _held=tuple((t, t._version) for t in read if t is not y),
            )
        )
        return y


def _is_packed() -> bool:
    """Whether what autograd saves is kept in another way, as by checkpointing, whose second forward
    has to save the same tensors."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
