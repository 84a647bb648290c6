"""Small tensors side by side: elementwise rules of the reference, run once for many tensors.

The reference takes tensor by tensor, a launch for every operator of every tensor. Here the tensors
that share a rule, its hyper-parameters, dtype and device become one vector, on which the reference
runs once. Copying costs a read and a write of every operand; a launch costs the time of moving
`LONGEST` entries, so that longer tensors stay alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mts_fast import reference
from mts_fast._columns import (
    Column,
    are_contiguous,
    at,
    is_plain,
    joined,
    parts_of,
    put,
    shapes_of,
    sizes_of,
    strides_of,
)
from mts_fast._multi_tensor import parts
from mts_fast.backends.alike import Alike, alike, are_alike, scalars_of
from mts_fast.backends.eligibility import same_layout
from mts_fast.reference.update_rules import ElementwiseState
from mts_fast.reference.update_rules.states import states_at
from mts_fast.reference.virtual_update import State, masked_direction

# entries of the longest tensor that is put beside others, by device type; of others: OTHER_DEVICES
LONGEST = {"cpu": 2**13}
OTHER_DEVICES = 2**19


def virtual_update(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], states: Sequence[State]
) -> list[Tensor]:
    """theta' of every parameter."""
    out: list[Tensor] = list(parameters)
    for row in _rows(states, parameters, gradients):
        p, g = row.columns
        row.scatter(out, reference.virtual_update(p, g, row.state))
    return out


def hypergradient_direction(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    states: Sequence[State],
    along: Sequence[Tensor],
    hypergradient_lr: float | None,
    largest: Tensor,
) -> tuple[list[Tensor], list[Tensor]]:
    """(kappa^T along, counts of masked entries)."""
    out: list[Tensor] = list(along)
    counts: list[Tensor] = []
    multiples, others = _multiples(parameters, states, along, hypergradient_lr)
    for factor, members in multiples:
        put(out, members, _times(at(along, members), factor))
    columns = [at(column, others) for column in (parameters, gradients, along)]
    made = list(columns[2])
    for row in _rows(states_at(states, others), *columns):
        p, g, v = row.columns
        direction, noise = masked_direction(p, g, row.state, v, hypergradient_lr, largest)
        row.scatter(made, direction)
        counts += [] if noise is None else [noise.sum()]
    put(out, others, made)
    return out, counts


def perturb(
    parameters: Sequence[Tensor], direction: Sequence[Tensor], scale: Tensor
) -> list[Tensor]:
    """parameter + scale * direction, in the parameter's dtype."""
    out: list[Tensor] = list(parameters)
    for row in _rows(None, parameters, direction):
        p, v = row.columns
        row.scatter(out, reference.perturb([p], [v], scale)[0])
    return out


def _multiples(
    parameters: Sequence[Tensor],
    states: Sequence[State],
    along: Sequence[Tensor],
    hypergradient_lr: float | None,
) -> tuple[list[tuple[float, list[int]]], list[int]]:
    """(numbers and the parameters whose kappa they are; the others)."""
    multiples: dict[tuple[float, torch.dtype, torch.device], list[int]] = defaultdict(list)
    others: list[int] = []

    def note(state: State, p: Tensor, v: Tensor, members: list[int], *, plain: bool) -> None:
        factor = _scalar_kappa(state, hypergradient_lr)
        exact = p.dtype == v.dtype and v.dtype in (torch.float32, torch.float64)
        if factor is not None and exact and plain:
            multiples[factor, v.dtype, v.device] += members
        else:
            others.extend(members)

    groups, rest = alike(states, parameters, along)
    for group in groups:
        p, v = group.columns
        note(group.state, p[0], v[0], group.members, plain=True)
    for i in rest:
        note(states[i], parameters[i], along[i], [i], plain=is_plain(along[i]))
    return [(factor, members) for (factor, *_), members in multiples.items()], sorted(others)


def _times(tensors: Sequence[Tensor], factor: float) -> Sequence[Tensor]:
    if tensors[0].device.type not in LONGEST:
        return torch._foreach_mul(list(tensors), factor)
    # on a CPU a multi-tensor operator is a loop
    out = list(tensors)
    for row in _rows(None, tensors):
        row.scatter(out, row.columns[0] * factor)
    return out


def _scalar_kappa(state: State, hypergradient_lr: float | None) -> float | None:
    """kappa where it is one number on the host."""
    if not isinstance(state, ElementwiseState):
        return None
    kappa = state.scalar_kappa(state.lr if hypergradient_lr is None else hypergradient_lr)
    return None if isinstance(kappa, Tensor) else kappa


@dataclass(frozen=True)
class _Row:
    """Tensors that are treated as one: one of any kind, or several side by side."""

    indices: Sequence[int]
    like: Sequence[Tensor]
    columns: list[Tensor]  # one tensor for each list
    state: Any  # of all; None where there are no states

    @classmethod
    def of(
        cls,
        indices: Sequence[int],
        columns: Sequence[Sequence[Tensor]],
        state: State | None = None,
        tensors: Mapping[str, Sequence[Tensor]] | None = None,
    ) -> _Row:
        """The row of these columns, and of a state with these tensors."""
        if tensors:
            assert isinstance(state, ElementwiseState)
            state = state.live(**{name: _joined(column) for name, column in tensors.items()})
        return cls(indices, columns[0], list(map(_joined, columns)), state)

    def scatter(self, out: list[Tensor], joined: Tensor) -> None:
        """Put the parts of a result into their places, as views."""
        if len(self.indices) == 1:
            out[self.indices[0]] = joined
        else:
            put(out, self.indices, parts_of(joined, shapes_of(self.like), strides_of(self.like)))


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """Entries in the order of memory."""
    if len(tensors) == 1:
        return tensors[0]
    if are_contiguous(tensors):
        return joined(tensors)
    return torch.cat([t.as_strided((t.numel(),), (1,), t.storage_offset()) for t in tensors])


def _rows(states: Sequence[State] | None, *columns: Sequence[Tensor]) -> Iterator[_Row]:
    """Every parameter with its state and what is beside it in the columns, in one of the rows."""
    groups: list[Alike] = []
    others = list(range(len(columns[0])))
    if states is not None:
        groups, others = alike(states, *columns)
    elif others and are_alike(columns):
        groups, others = [Alike(others, None, list(map(Column, columns)), {})], []
    for group in groups:
        yield from _rows_of(group)
    together: dict[Hashable, list[int]] = defaultdict(list)
    for i in others:
        state = None if states is None else states[i]
        together[_key(i, state, *(column[i] for column in columns))].append(i)
    for members in together.values():
        for part in parts(at(columns[0], members)):
            indices = at(members, part)
            state = None if states is None else states[indices[0]]
            tensors = {}
            if len(indices) > 1 and isinstance(state, ElementwiseState):
                assert states is not None
                names = _tensor_names(state)
                tensors = {n: [getattr(states[i], n) for i in indices] for n in names}
            yield _Row.of(indices, [at(c, indices) for c in columns], state, tensors)


def _rows_of(group: Alike) -> Iterator[_Row]:
    """Rows of parameters that are alike: long and empty ones by themselves."""
    sizes = sizes_of(group.columns[0])
    longest = _longest(group.columns[0][0])
    short = [k for k, size in enumerate(sizes) if 0 < size <= longest]
    chunks = [at(short, part) for part in parts(at(group.columns[0], short))]
    if len(short) < len(sizes):
        chunks += [[k] for k in sorted(set(range(len(sizes))).difference(short))]
    for chunk in chunks:
        columns = [at(column, chunk) for column in group.columns]
        tensors = {name: at(column, chunk) for name, column in group.tensors.items()}
        yield _Row.of(at(group.members, chunk), columns, group.state, tensors)


def _longest(like: Tensor) -> int:
    """Entries of the longest tensor of its device that is put beside others."""
    return LONGEST.get(like.device.type, OTHER_DEVICES)


def _key(i: int, state: State | None, parameter: Tensor, *others: Tensor) -> Hashable:
    """Tensors of equal key are put side by side; i, where this one stays alone."""
    tensors = [parameter, *others]
    scalars: Hashable = None
    if state is not None:
        if not isinstance(state, ElementwiseState):
            return i
        names = _tensor_names(state)
        tensors += [getattr(state, name) for name in names]
        scalars = scalars_of(state), tuple(names)
    if not 0 < parameter.numel() <= _longest(parameter):
        return i
    if not all(is_plain(t) and same_layout(parameter, t) for t in tensors):
        return i
    dense: Callable[[Tensor], Any] = torch.ops.aten.is_non_overlapping_and_dense
    if not parameter.is_contiguous() and not dense(parameter):
        return i
    return scalars, parameter.device, *(t.dtype for t in tensors)


def _tensor_names(state: ElementwiseState) -> list[str]:
    """Names of the state's tensors that are there."""
    return [name for name in state.tensors if getattr(state, name) is not None]
