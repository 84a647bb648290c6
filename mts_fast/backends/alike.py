"""Which parameters one call can serve together: asked of columns of tensors, not of each tensor."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

from torch import Tensor

from mts_fast._columns import (
    Column,
    are_contiguous,
    are_missing,
    are_plain,
    are_present,
    as_column,
    devices_of,
    dtypes_of,
    end_to_end,
    shapes_of,
)
from mts_fast.reference.update_rules import ElementwiseState
from mts_fast.reference.update_rules.states import StateColumns, States
from mts_fast.reference.virtual_update import State


class Alike(NamedTuple):
    """Parameters whose states have equal hyper-parameters and counts and the same tensors; all
    tensors are contiguous, those of a column of one dtype, and all on one device."""

    members: list[int]
    state: Any  # an ElementwiseState, that of the first; None where there are no states
    columns: list[Column]  # parameters, and what came beside them
    tensors: dict[str, Column]  # of the states, by the names of their fields


def alike(states: Sequence[State], *columns: Sequence[Tensor]) -> tuple[list[Alike], list[int]]:
    """(groups that can be served together, indices of the parameters that are to be looked at one
    by one). `columns`: parameters, gradients and others of their shapes and devices."""
    if not isinstance(states, States):
        return [], list(range(len(states)))
    together: dict[Hashable, list[Alike]] = {}
    others: list[int] = []
    start = 0
    for group in states.groups:
        members = list(range(start, start + len(group)))
        start += len(group)
        whole = len(group) == len(states)
        part = [as_column(c) if whole else Column(c[members[0] : start]) for c in columns]
        made = _alike(group, members, part)
        if made is None:
            others += members
        else:
            together.setdefault(_key(made), []).append(made)
    return [_merged(groups) for groups in together.values()], others


def are_alike(columns: Sequence[Sequence[Tensor]]) -> bool:
    """Whether all tensors are contiguous, those of a column of one dtype, those of a row of one
    shape, and all on one device."""
    device = devices_of(columns[0])
    shapes = shapes_of(columns[0])
    return all(
        are_plain(column)
        and are_contiguous(column)
        and len(dtypes_of(column)) == 1
        and len(device) == 1
        and devices_of(column) == device
        and shapes_of(column) == shapes
        for column in columns
    )


def _alike(group: Sequence[State], members: list[int], columns: list[Column]) -> Alike | None:
    """The group; None where its parameters differ in some way."""
    if not isinstance(group, StateColumns):
        return None
    for counts in group.counts.values():
        # tensors are not compared: reading them would wait for their device
        if not set(map(type, counts)) <= {float, int} or len(set(counts)) > 1:
            return None
    present = {n: c for n, c in group.tensors.items() if not are_missing(c)}
    if not all(map(are_present, present.values())):
        return None
    tensors = {name: as_column(c) for name, c in present.items()}  # type: ignore[arg-type]
    if not are_alike([*columns, *tensors.values()]):
        return None
    first: dict[str, Any] = {name: c[0] for name, c in {**group.tensors, **group.counts}.items()}
    return Alike(members, group.base.live(**first), columns, tensors)


def _key(group: Alike) -> Hashable:
    """Equal for groups of the optimizer that one call can serve."""
    columns = [*group.columns, *group.tensors.values()]
    dtypes = [tuple(dtypes_of(column)) for column in columns]
    return scalars_of(group.state), *group.tensors, *dtypes, *devices_of(columns[0])


def _merged(groups: Sequence[Alike]) -> Alike:
    if len(groups) == 1:
        return groups[0]
    members = [i for group in groups for i in group.members]
    columns = [end_to_end(*parts) for parts in zip(*(g.columns for g in groups), strict=True)]
    names = groups[0].tensors
    tensors = {name: end_to_end(*(g.tensors[name] for g in groups)) for name in names}
    return Alike(members, groups[0].state, columns, tensors)


def scalars_of(state: ElementwiseState) -> Hashable:
    """The rule with its hyper-parameters and counts; equal for those that compute the same."""
    names = (n for n in _field_names(type(state)) if n not in state.tensors)
    return type(state), *((name, _hashable(getattr(state, name))) for name in names)


@functools.cache
def _field_names(kind: type) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind))


def _hashable(value: Any) -> Hashable:
    """A scalar, one on a device by its identity."""
    if isinstance(value, tuple):
        return tuple(map(_hashable, value))
    return id(value) if isinstance(value, Tensor) else value
