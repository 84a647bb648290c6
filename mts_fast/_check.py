"""Validation helpers: errors read `<op>: <arg> must be <expected>, got <actual>[; hint]`."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def fail(
    error: type[Exception], op: str, arg: str, expected: str, got: object, hint: str = ""
) -> NoReturn:
    """Raise `error` in the one format that all of mts_fast uses."""
    raise error(f"{op}: {arg} must be {expected}, got {got}" + (f"; {hint}" if hint else ""))


def describe(value: object) -> str:
    """Say what a value is in a few words, for error messages."""
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    return f"{type(value).__name__} {value!r}"[:120]


def check_tensor(op: str, arg: str, value: object, *, ndim: int | None = None) -> Tensor:
    """A tensor, of `ndim` dimensions where given."""
    if not isinstance(value, Tensor):
        fail(TypeError, op, arg, "a tensor", describe(value), "convert it with torch.as_tensor")
    if ndim is not None and value.ndim != ndim:
        fail(ValueError, op, arg, f"{ndim}-dimensional", describe(value))
    return value


def check_floating(op: str, arg: str, value: object, *, ndim: int | None = None) -> Tensor:
    """A floating-point tensor."""
    tensor = check_tensor(op, arg, value, ndim=ndim)
    if not tensor.is_floating_point():
        fail(TypeError, op, arg, "a floating-point tensor", describe(tensor), "call .float() on it")
    return tensor


def check_integer(op: str, arg: str, value: object, *, ndim: int | None = None) -> Tensor:
    """An integer tensor."""
    tensor = check_tensor(op, arg, value, ndim=ndim)
    if tensor.dtype not in INTEGER_DTYPES:
        fail(TypeError, op, arg, "an integer tensor", describe(tensor), "call .long() on it")
    return tensor


def check_flags(op: str, arg: str, value: object, length: int) -> Tensor:
    """Booleans or 0/1 integers of the given length, returned as bool [length]."""
    tensor = check_tensor(op, arg, value, ndim=1)
    if tensor.dtype != torch.bool and tensor.dtype not in INTEGER_DTYPES:
        fail(TypeError, op, arg, "a bool or integer tensor", describe(tensor))
    check_length(op, arg, tensor, length)
    if tensor.dtype != torch.bool and not tensor.is_cuda:  # there it would wait for the device
        check_range(op, arg, tensor, 0, 2)
    return tensor.bool()


def check_length(op: str, arg: str, value: Tensor, length: int) -> None:
    """First axis of the given length."""
    if value.shape[0] != length:
        fail(ValueError, op, arg, f"of length {length}", describe(value))


def check_device(op: str, arg: str, value: Tensor, device: torch.device, like: str) -> None:
    """On the device of another argument."""
    if value.device != device:
        hint = f"move it with .to({str(device)!r})"
        fail(ValueError, op, arg, f"on {device} like {like}", f"a tensor on {value.device}", hint)


def check_not_empty(op: str, arg: str, value: Tensor) -> None:
    """At least one element along the first axis."""
    if value.ndim == 0 or value.shape[0] == 0:
        fail(ValueError, op, arg, "non-empty", describe(value))


def check_range(op: str, arg: str, value: Tensor, low: int, high: int, hint: str = "") -> None:
    """Integers in [low, high). Reads the tensor: on a GPU this waits for it."""
    if value.numel() == 0:
        return
    least, most = int(value.min()), int(value.max())
    if least < low or most >= high:
        fail(ValueError, op, arg, f"in [{low}, {high})", f"values from {least} to {most}", hint)


def check_finite(op: str, arg: str, value: Tensor, hint: str = "", *, first: int = 0) -> None:
    """No NaN, no infinity; names the bad rows, counted from `first`. On a GPU this waits."""
    # a sum with a NaN or infinity in it is never finite; where it overflows, look at every value.
    if torch.isfinite(value.sum()) or torch.isfinite(value).all():
        return
    bad = ~torch.isfinite(value.detach().reshape(value.shape[0] if value.ndim else 1, -1)).all(1)
    rows = (bad.nonzero().flatten() + first).tolist()
    shown = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
    fail(ValueError, op, arg, "finite", f"NaN or infinity in {len(rows)} rows ({shown})", hint)


def check_choice(op: str, arg: str, value: object, choices: tuple[str, ...]) -> None:
    """One of a few strings."""
    if value not in choices:
        fail(ValueError, op, arg, "one of " + ", ".join(map(repr, choices)), describe(value))


def check_positive_int(op: str, arg: str, value: object) -> None:
    """An int of 1 or more (bool refused)."""
    if isinstance(value, bool) or not isinstance(value, int):
        fail(TypeError, op, arg, "a positive int", describe(value))
    if value < 1:
        fail(ValueError, op, arg, "a positive int", value)


def check_pool(op: str, labels: object, is_synthetic: object, length: int) -> tuple[Tensor, Tensor]:
    """Classes and sources of a pool, returned as int64 [length] >= 0 and bool [length]."""
    classes = check_integer(op, "labels", labels, ndim=1).long()
    check_length(op, "labels", classes, length)
    flags = check_flags(op, "is_synthetic", is_synthetic, length)
    if length:
        check_range(op, "labels", classes, 0, int(classes.max()) + 1, "number the classes from 0")
    return classes, flags
