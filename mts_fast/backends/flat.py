"""Small tensors side by side: elementwise rules of the reference, run once for many tensors.

The reference takes tensor by tensor, a launch for every operator of every tensor. Here the tensors
that share a rule, its hyper-parameters, dtype and device become one vector, on which the reference
runs once. Copying costs a read and a write of every operand; a launch costs the time of moving
`LONGEST` entries, so that longer tensors stay alone.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from mts_fast import reference
from mts_fast._columns import is_plain
from mts_fast._multi_tensor import parts
from mts_fast.backends.eligibility import same_layout
from mts_fast.reference.update_rules import ElementwiseState
from mts_fast.reference.virtual_update import State, masked_direction

# entries of the longest tensor that is put beside others, by device type; of others: OTHER_DEVICES
LONGEST = {"cpu": 2**13}
OTHER_DEVICES = 2**19


def virtual_update(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], states: Sequence[State]
) -> list[Tensor]:
    """theta' of every parameter."""
    out: list[Tensor] = list(parameters)
    for row in _rows(parameters, gradients, states=states):
        p, g = row.columns(parameters, gradients)
        row.scatter(out, reference.virtual_update(p, g, row.state(states)))
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
    multiples: dict[tuple[float, torch.dtype, torch.device], list[int]] = defaultdict(list)
    others = []
    for i, (state, p, v) in enumerate(zip(states, parameters, along, strict=True)):
        factor = _scalar_kappa(state, hypergradient_lr)
        exact = p.dtype == v.dtype and v.dtype in (torch.float32, torch.float64)
        if factor is not None and exact and is_plain(v):
            multiples[factor, v.dtype, v.device].append(i)
        else:
            others.append(i)
    for (factor, *_), members in multiples.items():
        made = torch._foreach_mul([along[i] for i in members], factor)
        for i, direction in zip(members, made, strict=True):
            out[i] = direction
    columns = [[column[i] for i in others] for column in (parameters, gradients, along)]
    rest = [states[i] for i in others]
    for row in _rows(*columns, states=rest):
        p, g, v = row.columns(*columns)
        direction, noise = masked_direction(p, g, row.state(rest), v, hypergradient_lr, largest)
        row.scatter(columns[2], direction)
        counts += [] if noise is None else [noise.sum()]
    for i, direction in zip(others, columns[2], strict=True):
        out[i] = direction
    return out, counts


def _scalar_kappa(state: State, hypergradient_lr: float | None) -> float | None:
    """kappa where it is one number on the host."""
    if not isinstance(state, ElementwiseState):
        return None
    kappa = state.scalar_kappa(state.lr if hypergradient_lr is None else hypergradient_lr)
    return None if isinstance(kappa, Tensor) else kappa


def perturb(
    parameters: Sequence[Tensor], direction: Sequence[Tensor], scale: Tensor
) -> list[Tensor]:
    """parameter + scale * direction, in the parameter's dtype."""
    out: list[Tensor] = list(parameters)
    for row in _rows(parameters, direction):
        p, v = row.columns(parameters, direction)
        row.scatter(out, reference.perturb([p], [v], scale)[0])
    return out


class _Row:
    """Tensors that are treated as one: one of any kind, or several side by side."""

    def __init__(self, indices: Sequence[int], like: Sequence[Tensor]) -> None:
        self._indices = indices
        self._like = [like[i] for i in indices]

    def columns(self, *lists: Sequence[Tensor]) -> list[Tensor]:
        """One tensor for each list."""
        return [self._joined([column[i] for i in self._indices]) for column in lists]

    def state(self, states: Sequence[State]) -> State:
        """The state of all."""
        first = states[self._indices[0]]
        if len(self._indices) == 1:
            return first
        assert isinstance(first, ElementwiseState)
        names = _tensor_names(first)
        joined = {n: self._joined([getattr(states[i], n) for i in self._indices]) for n in names}
        return replace(first, **joined)  # type: ignore[type-var]

    def scatter(self, out: list[Tensor], joined: Tensor) -> None:
        """Put the parts of a result into their places, as views."""
        if len(self._indices) == 1:
            out[self._indices[0]] = joined
            return
        start = joined.storage_offset()
        for i, like in zip(self._indices, self._like, strict=True):
            out[i] = joined.as_strided(like.shape, like.stride(), start)
            start += like.numel()

    def _joined(self, tensors: list[Tensor]) -> Tensor:
        """Entries in the order of memory."""
        if len(tensors) == 1:
            return tensors[0]
        return torch.cat([t.as_strided((t.numel(),), (1,), t.storage_offset()) for t in tensors])


def _rows(
    parameters: Sequence[Tensor],
    *others: Sequence[Tensor],
    states: Sequence[State] | None = None,
) -> Iterator[_Row]:
    together: dict[Hashable, list[int]] = defaultdict(list)
    for i, columns in enumerate(zip(parameters, *others, strict=True)):
        together[_key(i, None if states is None else states[i], *columns)].append(i)
    for members in together.values():
        for part in parts([parameters[i] for i in members]):
            yield _Row([members[k] for k in part], parameters)


def _key(i: int, state: State | None, parameter: Tensor, *others: Tensor) -> Hashable:
    """Tensors of equal key are put side by side; i, where this one stays alone."""
    tensors = [parameter, *others]
    scalars: Hashable = None
    if state is not None:
        if not isinstance(state, ElementwiseState):
            return i
        scalars = tuple(
            (name, _hashable(getattr(state, name)))
            for name in _field_names(type(state))
            if name not in state.tensors
        )
        names = _tensor_names(state)
        tensors += [getattr(state, name) for name in names]
        scalars = scalars, tuple(names)
    limit = LONGEST.get(parameter.device.type, OTHER_DEVICES)
    if not 0 < parameter.numel() <= limit:
        return i
    if not all(is_plain(t) and same_layout(parameter, t) for t in tensors):
        return i
    dense: Callable[[Tensor], Any] = torch.ops.aten.is_non_overlapping_and_dense
    if not parameter.is_contiguous() and not dense(parameter):
        return i
    return type(state), scalars, parameter.device, *(t.dtype for t in tensors)


def _tensor_names(state: ElementwiseState) -> list[str]:
    """Names of the state's tensors that are there."""
    return [name for name in state.tensors if getattr(state, name) is not None]


@functools.cache
def _field_names(kind: type) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind))


def _hashable(value: Any) -> Hashable:
    """A scalar, one on a device by its identity."""
    if isinstance(value, tuple):
        return tuple(map(_hashable, value))
    return id(value) if isinstance(value, Tensor) else value
