"""torch's state of a thread, which an exception inside torch's own clean-up leaves changed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode_stack,
    _pop_torch_function_stack,
    _push_on_torch_function_stack,
)


class FunctionMode(TorchFunctionMode, ABC):
    """A function mode, by `call`. Its exit does nothing where an exception has left it off the
    stack: torch pops a mode for the time of every call that the mode sees."""

    @abstractmethod
    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of one of torch's functions; inside, the mode is off."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return self.call(func, args, kwargs or {})

    def __exit__(self, *raised: object) -> None:
        stack = _get_current_function_mode_stack()
        if stack and stack[-1] is self:
            super().__exit__(*raised)


@dataclass(frozen=True)
class Ambient:
    """Whether gradients are recorded, the function modes, and how deep forward AD is nested."""

    grad_enabled: bool
    modes: list[TorchFunctionMode]
    level: int

    @classmethod
    def capture(cls) -> Ambient:
        """The current state."""
        level = forward_ad._current_level
        return cls(torch.is_grad_enabled(), _get_current_function_mode_stack(), level)

    def restore(self) -> None:
        """After an exception: leave modes and levels entered since the capture, and enter those
        that were left. May be repeated."""
        # torch counts the levels twice, and the two counts may differ
        for level in range(max(forward_ad._current_level, self.level + 1), self.level, -1):
            with suppress(RuntimeError):
                torch._C._exit_dual_level(level=level)
        forward_ad._current_level = self.level
        present = _get_current_function_mode_stack()
        if [*map(id, present)] != [*map(id, self.modes)]:
            for _ in present:
                _pop_torch_function_stack()
            for mode in self.modes:
                _push_on_torch_function_stack(mode)
        if torch.is_grad_enabled() != self.grad_enabled:
            torch._C._set_grad_enabled(self.grad_enabled)
