"""One call of one of torch's functions, as a mode sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from mts_fast.hypergradient.ghost.watch import plain_name, writes_in_place


def tensors_in(value: Any, named: Mapping[str, Any] | None = None) -> list[Tensor]:
    """All tensors in a nest, and in another one by name."""
    if isinstance(value, Tensor):
        return [value]
    tensors: list[Tensor] = []
    todo: list[Any] = []
    if isinstance(value, tuple):  # the usual case: tensors and numbers, and no nests
        for entry in value:
            if isinstance(entry, Tensor):
                tensors.append(entry)
            elif isinstance(entry, tuple | list | dict):
                todo = [value]
                tensors = []
                break
    else:
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


class Call:
    """A function and its arguments.

    Attributes:
        name: the function's name, without an in-place underscore.
        tensors: all tensors among the arguments.
        written: the tensor that the call writes to, if it does so in place.
    """

    # hundreds are made in a forward
    __slots__ = ("args", "function", "kwargs", "name", "tensors", "written")

    def __init__(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.function = function
        self.args = args
        self.kwargs = kwargs
        self.name = plain_name(function)
        self.tensors = tensors_in(args, kwargs)
        first = args[0] if args and writes_in_place(function) else None
        self.written = first if isinstance(first, Tensor) else None

    def run(self) -> Any:
        """The function's result."""
        return self.function(*self.args, **self.kwargs)

    def with_others(self, others: Mapping[int, Tensor]) -> Call:
        """The call with other tensors in place of those of these ids."""
        if not others:
            return self

        def other(t: Tensor) -> Tensor:
            return others.get(id(t), t)

        return Call(self.function, swapped(self.args, other), swapped(self.kwargs, other))
