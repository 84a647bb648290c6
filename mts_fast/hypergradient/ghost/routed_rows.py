"""Rows of activations that an index gathered (tokens routed to an expert), followed from call to
call: which sample each row is of.

x[index] has rows in another order, or not all of them; functions that treat every row alike keep
it. Where rows of one order meet those of another, samples might be mixed, and the forward is
checked on its graph.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from mts_fast.hypergradient.ghost.calls import Call, tensors_in
from mts_fast.hypergradient.ghost.watch import may_mix, move_of
from mts_fast.hypergradient.ghost.weak_table import WeakTable

_GATHERS = {"__getitem__", "index_select"}
_BEGINNINGS = {*_GATHERS, "sort"}  # what makes a routed tensor of others
_SCATTERS = {"index_add", "index_copy", "__setitem__"}
_PARTS = {"split", "split_with_sizes", "chunk", "tensor_split"}
_STACKS = {"stack", "hstack", "vstack", "dstack"}
_JOINS = {"cat", "concat", "concatenate"}
_SHAPES = {"view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze"}


class RoutedRows:
    """The routed tensors of one forward of `size` samples; they are held weakly.

    `unclear` says that rows were lost sight of, met those of another order, or came from a tensor
    that may have its samples elsewhere: the forward has to be checked.
    """

    def __init__(self, size: int, ranges: Collection[int]) -> None:
        self.size = size
        self.unclear = False
        self._ranges = ranges  # ids of indices that are 0, 1, 2, ...
        self._samples: WeakTable[tuple[Tensor, int]] = WeakTable()

    def of(self, t: Tensor) -> tuple[Tensor, int] | None:
        """The sample [n] of every row of a routed tensor, and the axis of the rows."""
        return self._samples.get(t)

    def may_follow(self, call: Call) -> bool:
        """Whether `follow` has to see a call."""
        return self.size > 1 and (bool(self._samples) or call.name in _BEGINNINGS)

    def follow(self, call: Call, result: Any, parameters: Collection[int] = ()) -> bool:
        """Whether a call is understood: it gathers rows, or keeps those of different samples apart.

        `parameters` are the ids of arguments that hold no samples. A call that has them is taken
        for a layer that treats every row alike; the check of the forward sees where it does not.
        """
        if call.name in _GATHERS and self._gather(call, result, parameters):
            return True
        if call.name == "sort":
            self._sort(call, result)
        if not any(self.of(t) for t in call.tensors if t.requires_grad):
            return False
        if call.name in _SCATTERS:
            known = self._scatter(call)
        else:
            known = call.name in _JOINS and self._join(call, result)
            known = known or self._keep(call, result, parameters)
        self.unclear = self.unclear or not known
        return known

    def end(self, losses: Tensor) -> None:
        """The forward has ended: its losses have to be in the order of the samples."""
        known = self.of(losses)
        if known is not None:
            in_order = torch.arange(self.size, device=known[0].device)
            self.unclear = self.unclear or not torch.equal(known[0], in_order)

    def _sort(self, call: Call, result: Any) -> None:
        """The entries of a list, one for every row, in another order."""
        x = call.args[0] if call.args else None
        if isinstance(x, Tensor) and x.ndim == 1 and not x.requires_grad:
            samples = self._rows(x)
            if samples is not None:
                for t in (result[0], result[1]):
                    self._samples.set(t, (samples[result[1]], 0))

    def _gather(self, call: Call, result: Any, parameters: Collection[int]) -> bool:
        """x[index], the rows of x in the order of an index or a mask."""
        x, rest = call.args[0], call.args[1:]
        if call.name == "index_select":
            axis, index = (*rest, call.kwargs.get("dim"), call.kwargs.get("index"))[:2]
            items: tuple[Any, ...] = (index,) if axis == 0 else ()
        else:
            items = rest[0] if isinstance(rest[0], tuple) else rest[:1]
        added = bool(items) and items[0] is None  # x[None, index]: an axis before the rows
        items = items[added:]
        if not items or not isinstance(items[0], Tensor) or items[0].ndim != 1:
            return False
        if any(isinstance(i, Tensor) and i.ndim != 1 for i in items):
            return False
        if id(items[0]) in self._ranges and self.of(x) is None:
            return False  # the rows stay where they are
        if id(x) in parameters:  # a row of a table for every entry of the index
            known = self.of(items[0])
            rows = None if known is None else known[0]
        else:
            samples = self._rows(x)
            rows = None if samples is None else samples[items[0].to(samples.device)]
        if rows is None or not result.requires_grad or not result.ndim > added:
            return False
        if result.shape[int(added)] != len(rows):
            return False
        if id(x) not in parameters and self.of(x) is None:
            # x may have its samples on another axis
            self.unclear = self.unclear or x.ndim > 2 or self.size in x.shape[1:]
        self._samples.set(result, (rows, int(added)))
        return True

    def _scatter(self, call: Call) -> bool:
        """Rows are written, or added, to rows of the same samples."""
        x = call.args[0]
        if call.name == "__setitem__":
            index, source = call.args[1], call.args[2]
        else:
            arguments = [*call.args[1:], *(call.kwargs.get(n) for n in ("dim", "index", "source"))]
            present = [a for a in arguments if a is not None]
            if len(present) < 3 or present[0] != 0:
                return False
            index, source = present[1], present[2]
        samples = self._rows(x)
        if samples is None or not isinstance(index, Tensor) or index.ndim != 1:
            return False
        known = self.of(source) if isinstance(source, Tensor) else None
        return known is not None and known[1] == 0 and torch.equal(samples[index], known[0])

    def _keep(self, call: Call, result: Any, parameters: Collection[int]) -> bool:
        """A function that treats every row alike."""
        tensors = [t for t in call.tensors if t.requires_grad and id(t) not in parameters]
        routed = [(t, known) for t in tensors if (known := self.of(t)) is not None]
        if not routed:
            return False
        x, (samples, axis) = routed[0]
        for t in tensors:
            if t is x or t.is_leaf:
                continue
            other = self.of(t)
            if other is None or not (other[1] == axis and torch.equal(other[0], samples)):
                return False
        made = tensors_in(result)
        if call.name in _SHAPES:
            for t in made:
                if axis == 1 and x.shape[0] == 1 and t.ndim and t.shape[0] == len(samples):
                    self._samples.set(t, (samples, 0))
                elif t.ndim > axis and t.shape[axis] == len(samples):
                    self._samples.set(t, (samples, axis))
            return all(self.of(t) is not None for t in made)
        if axis or move_of(call.name, call.args, call.kwargs) is not None:
            return False
        n = len(samples)
        broadcast = len(tensors) > 1 and any(m.ndim > t.ndim for m in made for t in tensors)
        if broadcast or call.name in _STACKS:
            return False
        if not parameters and self._may_mix(call, n):
            return self._parted(call, made, samples)
        if not all(t.ndim and t.shape[0] == n for t in made):
            return False
        for t in made:
            self._samples.set(t, (samples, 0))
        return True

    @staticmethod
    def _may_mix(call: Call, n: int) -> bool:
        return may_mix(call.name, call.args, call.kwargs, n, lambda index: False, first_axis=True)

    def _parted(self, call: Call, made: Sequence[Tensor], samples: Tensor) -> bool:
        """x.split(sizes): the rows, part after part."""
        if call.name not in _PARTS or sum(t.shape[0] for t in made) != len(samples):
            return False
        lengths = [t.shape[0] for t in made]
        for t, rows in zip(made, samples.split(lengths), strict=True):
            self._samples.set(t, (rows, 0))
        return True

    def _join(self, call: Call, result: Any) -> bool:
        """torch.cat of rows: one list after the other."""
        parts = call.args[0] if call.args else call.kwargs.get("tensors", ())
        axis = call.args[1] if len(call.args) > 1 else call.kwargs.get("dim", 0)
        known = [self.of(t) for t in parts]
        if axis != 0 or not known or any(k is None or k[1] for k in known):
            return False
        rows = torch.cat([k[0] for k in known if k is not None])
        self._samples.set(result, (rows, 0))
        return True

    def _rows(self, x: Tensor) -> Tensor | None:
        """The sample of every row of x; of a tensor that is not routed, in order."""
        known = self.of(x)
        if known is not None:
            return known[0] if known[1] == 0 else None
        if not x.ndim or not x.shape[0] or x.shape[0] % self.size:
            return None
        samples = torch.arange(self.size, device=x.device)
        return samples.repeat_interleave(x.shape[0] // self.size)
