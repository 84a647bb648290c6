"""Runs a model in float64 throughout, also where it asks for float32 itself (norms, rotary
positions), so that engines can be compared to rounding of float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mts_fast._ambient import FunctionMode

_NARROW = (torch.float32, torch.bfloat16, torch.float16)
_CASTS = {Tensor.float, Tensor.half, Tensor.bfloat16}


class _InDouble(FunctionMode):
    """Casts to a narrower floating dtype become casts to float64."""

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in _CASTS:
            return args[0].double()
        return func(*map(_wide, args), **{name: _wide(value) for name, value in kwargs.items()})


def _wide(value: Any) -> Any:
    return torch.float64 if value in _NARROW and isinstance(value, torch.dtype) else value


@contextmanager
def in_double() -> Iterator[None]:
    """float64 is the default dtype inside, and what models ask for in place of narrower ones."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _InDouble():
            yield
    finally:
        torch.set_default_dtype(before)
