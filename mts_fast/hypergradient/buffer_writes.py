"""Buffers that a forward writes and then reads, held at the values of the training forward.

Autograd takes what a forward wrote into a buffer without a graph (a running centre, a codebook, a
mean norm) as a constant. A difference of two forwards would see it move.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Self

from torch import Tensor, nn
from torch.nn.modules.module import register_module_buffer_registration_hook

from mts_fast._ambient import FunctionMode
from mts_fast._isolation import World

# a write: the value after it, or None where it carries a graph and is no constant
Written = Tensor | None


class _Watch(FunctionMode):
    """Intercepts every assignment of a buffer, and every function that writes into one."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world
        self._handle: Any = None

    def __enter__(self) -> Self:
        self._known = {id(b) for b in self._world.buffers()}
        self._handle = register_module_buffer_registration_hook(
            self._assigned  # type: ignore[arg-type]  # what a hook returns is assigned
        )
        super().__enter__()
        return self

    def __exit__(self, *raised: object) -> None:
        self._handle.remove()
        super().__exit__(*raised)

    def _assigned(self, module: nn.Module, name: str, value: Tensor | None) -> Tensor | None:
        if not isinstance(value, Tensor):
            return value
        value = self.on_write(value)
        self._known.add(id(value))
        return value

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        in_place = name == "__setitem__" or (name.startswith("__i") and name.endswith("__"))
        in_place = in_place or (name.endswith("_") and not name.endswith("__"))
        if in_place and args and id(args[0]) in self._known:
            value = self.on_write(args[0])
            if value is not args[0]:
                args[0].data.copy_(value)
        return result

    @abstractmethod
    def on_write(self, value: Tensor) -> Tensor:
        """The value that the buffer holds after this write."""


class RecordedWrites(_Watch):
    """Around the training forward: records every value that is written."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.values: list[Written] = []

    def on_write(self, value: Tensor) -> Tensor:
        self.values.append(None if value.requires_grad else value.detach().clone())
        return value


class ReplayedWrites(_Watch):
    """Around another forward: its writes store the recorded values, in their order."""

    def __init__(self, world: World, values: Sequence[Written]) -> None:
        super().__init__(world)
        self._values = iter(values)

    def on_write(self, value: Tensor) -> Tensor:
        recorded = next(self._values, None)
        if recorded is None or recorded.shape != value.shape:
            return value
        return recorded.clone()
