"""The states of many parameters, by column: hyper-parameters once, tensors and counts as lists."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, overload

from torch import Tensor

from mts_fast._columns import Column, are_tensors, at
from mts_fast.reference.update_rules.rule import ElementwiseState, Number, Options, State, number


class LiveStates(list[Options]):
    """Entries of `optimizer.state`, asked by column; each column is read once."""

    def __init__(self, states: Iterable[Options]) -> None:
        super().__init__(states)
        self._columns: dict[str, list[Any]] = {}
        self._numbers: dict[str, list[Number]] = {}

    def column(self, name: str) -> list[Any]:
        """The entry of each; None where it is missing."""
        if name not in self._columns:
            entries: list[Any] = [state.get(name) for state in self]
            self._columns[name] = Column(entries) if are_tensors(entries) else entries
        return self._columns[name]

    def numbers(self, name: str) -> list[Number]:
        """The same of numbers; 0 where there is none."""
        if name not in self._numbers:
            entries = self.column(name)
            self._numbers[name] = [0.0 if n is None else number(n) for n in entries]
        return self._numbers[name]


class StateColumns(Sequence[State]):
    """States that have the hyper-parameters of `base`; objects are made when they are asked for.

    Args:
        base: hyper-parameters, without tensors and with counts of 0.
        tensors: a tensor for each parameter by the name of its field, or None for each, as before
            the first step; empty where the rule reads none.
        counts: a number for each parameter by the name of its field.
    """

    def __init__(
        self,
        base: ElementwiseState,
        size: int,
        tensors: Mapping[str, Sequence[Tensor | None]],
        counts: Mapping[str, Sequence[Number]],
    ) -> None:
        self.base = base
        self.tensors = tensors
        self.counts = counts
        self._size = size

    def __len__(self) -> int:
        return self._size

    @overload
    def __getitem__(self, i: int) -> State: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[State]: ...
    def __getitem__(self, i: int | slice) -> State | Sequence[State]:
        return self._objects[i]

    def at(self, indices: Sequence[int]) -> StateColumns:
        """The states of some of the parameters."""
        tensors = {name: [c[i] for i in indices] for name, c in self.tensors.items()}
        counts = {name: [c[i] for i in indices] for name, c in self.counts.items()}
        return StateColumns(self.base, len(indices), tensors, counts)

    @functools.cached_property
    def _objects(self) -> list[State]:
        columns = {**self.tensors, **self.counts}
        rows = zip(*columns.values(), strict=True) if columns else itertools.repeat((), self._size)
        return [self.base.live(**dict(zip(columns, row, strict=True))) for row in rows]


class States(Sequence[State]):
    """The states of the parameters of all groups, in their order."""

    def __init__(self, groups: Sequence[Sequence[State]]) -> None:
        self.groups = [group for group in groups if len(group)]

    def __len__(self) -> int:
        return sum(map(len, self.groups))

    @overload
    def __getitem__(self, i: int) -> State: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[State]: ...
    def __getitem__(self, i: int | slice) -> State | Sequence[State]:
        return self._objects[i]

    @functools.cached_property
    def _objects(self) -> list[State]:
        return list(itertools.chain.from_iterable(self.groups))


def anew(states: Sequence[State]) -> Sequence[State]:
    """The same, of which nothing was asked before."""
    if not isinstance(states, States):
        return states
    groups = [g.at(range(len(g))) if isinstance(g, StateColumns) else g for g in states.groups]
    return States(groups)


def states_at(states: Sequence[State], indices: Sequence[int]) -> Sequence[State]:
    """The states at these indices, which rise; by column where they were."""
    if not isinstance(states, States) or len(indices) == len(states):
        return at(states, indices)
    groups: list[Sequence[State]] = []
    start = 0
    for group in states.groups:
        inside = [i - start for i in indices if 0 <= i - start < len(group)]
        groups.append(group.at(inside) if isinstance(group, StateColumns) else at(group, inside))
        start += len(group)
    return States(groups)


def samples(states: Sequence[State]) -> list[State]:
    """States of every rule and set of hyper-parameters that occurs, without their tensors."""
    groups = states.groups if isinstance(states, States) else [states]
    of_each = [[g.base] if isinstance(g, StateColumns) else g for g in groups]
    return list(itertools.chain.from_iterable(of_each))
