"""One call of one of torch's functions, as a mode sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from mts_fast.hypergradient.ghost.watch import plain_name


def tensors_in(value: Any, named: Mapping[str, Any] | None = None) -> list[Tensor]:
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


def swapped(value: Any, other: Callable[[Tensor], Tensor]) -> Any:
    """A nest of arguments with a function of each tensor in its place."""
    if isinstance(value, Tensor):
        return other(value)
    if isinstance(value, tuple | list):
        values = [swapped(v, other) for v in value]
        return type(value)(*values) if hasattr(value, "_fields") else type(value)(values)
    if isinstance(value, dict):
        return {name: swapped(v, other) for name, v in value.items()}
    return value


@dataclass(frozen=True)
class Call:
    """A function and its arguments."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self) -> Any:
        """The function's result."""
        return self.function(*self.args, **self.kwargs)

    @cached_property
    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments."""
        return tensors_in(self.args, self.kwargs)

    @cached_property
    def name(self) -> str:
        """The function's name, without an in-place underscore."""
        return plain_name(self.function)

    @cached_property
    def written(self) -> Tensor | None:
        """The tensor that the call writes to, if it does so in place."""
        raw = getattr(self.function, "__name__", "")
        in_place = raw == "__setitem__" or (raw.endswith("_") and not raw.endswith("__"))
        in_place = in_place or (raw.startswith("__i") and raw not in ("__invert__", "__index__"))
        if in_place and self.args and isinstance(self.args[0], Tensor):
            return self.args[0]
        return None

    def with_others(self, others: Mapping[int, Tensor]) -> Call:
        """The call with other tensors in place of those of these ids."""
        if not others:
            return self

        def other(t: Tensor) -> Tensor:
            return others.get(id(t), t)

        return Call(self.function, swapped(self.args, other), swapped(self.kwargs, other))
