"""Nests of tuples, lists and mappings of tensors, as models take and give them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def leaves(nest: Any) -> list[Tensor]:
    """All tensors in a nest of tuples, lists and mappings."""
    if isinstance(nest, Tensor):
        return [nest]
    if isinstance(nest, tuple | list | Mapping):
        values = nest.values() if isinstance(nest, Mapping) else nest
        return [leaf for value in values for leaf in leaves(value)]
    return []


def map_tensors(nest: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The nest with a function of each tensor in its place."""
    if isinstance(nest, Tensor):
        return function(nest)
    if isinstance(nest, Mapping):
        return {name: map_tensors(value, function) for name, value in nest.items()}
    if isinstance(nest, tuple | list):
        values = [map_tensors(value, function) for value in nest]
        return type(nest)(*values) if hasattr(nest, "_fields") else values
    return nest


def join_nests(nests: Sequence[Any], join: Callable[[Sequence[Tensor]], Tensor]) -> Any:
    """Nests of one structure as one, each tensor joined with those in its place.

    Raises:
        TypeError, ValueError: nests of different structure.
    """
    first = nests[0]
    if isinstance(first, Tensor) and any(
        isinstance(n, Tensor) and n.ndim == 0 and not torch.equal(n, first) for n in nests
    ):
        raise ValueError("numbers must be equal, got different ones; pass the same in every call")
    if any(type(n) is not type(first) for n in nests):
        got = sorted({type(n).__name__ for n in nests})
        raise TypeError(f"nests must be of one type, got {got}; pass the same in every call")
    if isinstance(first, Tensor):
        return join(nests)
    if isinstance(first, Mapping):
        if any(n.keys() != first.keys() for n in nests):
            raise ValueError(f"keys must be {list(first)}, got others; pass the same in every call")
        return {name: join_nests([n[name] for n in nests], join) for name in first}
    if isinstance(first, tuple | list):
        values = [join_nests(column, join) for column in zip(*nests, strict=True)]
        return type(first)(*values) if hasattr(first, "_fields") else values
    if any(n != first for n in nests):
        raise ValueError(f"others must be {first!r:.60}, got others; pass the same in every call")
    return first
