"""Validation helpers: errors read `<op>: <arg> must be <expected>, got <actual>[; hint]`."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from numbers import Real
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

# what torch computes with on every device; 8-bit floats are storage only
FLOATING_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def fail(
    error: type[Exception], op: str, arg: str, expected: str, got: object, hint: str
) -> NoReturn:
    """Raise `error` in the one format of mts_fast: argument and expectation; actual value; hint.

    A test checks every call and every `raise` of the package for these three.
    """
    raise error(f"{op}: {arg} must be {expected}, got {got}; {hint}")


def describe(value: object) -> str:
    """A value in a few words, for error messages."""
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    return f"{type(value).__name__} {value!r}"[:120]


def check_tensor(op: str, arg: str, value: object, *, ndim: int | None = None) -> Tensor:
    """A tensor, of `ndim` dimensions where given."""
    if not isinstance(value, Tensor):
        fail(TypeError, op, arg, "a tensor", describe(value), "convert it with torch.as_tensor")
    if ndim is not None and value.ndim != ndim:
        hint = "reshape it, or pass the tensor that has these axes"
        fail(ValueError, op, arg, f"{ndim}-dimensional", describe(value), hint)
    return value


def check_floating(op: str, arg: str, value: object, *, ndim: int | None = None) -> Tensor:
    """A floating-point tensor."""
    tensor = check_tensor(op, arg, value, ndim=ndim)
    if tensor.dtype not in FLOATING_DTYPES:
        fail(TypeError, op, arg, "a floating-point tensor", describe(tensor), "call .float() on it")
    _check_strided(op, arg, tensor)
    return tensor


def _check_strided(op: str, arg: str, value: Tensor) -> None:
    if value.layout != torch.strided:
        got = f"a tensor of layout {value.layout}"
        fail(TypeError, op, arg, "a dense tensor", got, "call .to_dense() on it")


def check_integer(op: str, arg: str, value: object, *, ndim: int | None = None) -> Tensor:
    """An integer tensor."""
    tensor = check_tensor(op, arg, value, ndim=ndim)
    if tensor.dtype not in INTEGER_DTYPES:
        fail(TypeError, op, arg, "an integer tensor", describe(tensor), "call .long() on it")
    _check_strided(op, arg, tensor)
    return tensor


def check_flags(op: str, arg: str, value: object, length: int) -> Tensor:
    """Booleans or 0/1 integers of the given length, returned as bool [length]."""
    tensor = check_tensor(op, arg, value, ndim=1)
    if tensor.dtype != torch.bool and tensor.dtype not in INTEGER_DTYPES:
        fail(TypeError, op, arg, "a bool or integer tensor", describe(tensor), "call .bool() on it")
    check_length(op, arg, tensor, length)
    if tensor.dtype != torch.bool and not tensor.is_cuda:  # there it would wait for the device
        check_range(op, arg, tensor, 0, 2)
    return tensor.bool()


def check_length(op: str, arg: str, value: Tensor, length: int) -> None:
    """First axis of the given length."""
    if value.shape[0] != length:
        hint = "pass one entry per sample"
        fail(ValueError, op, arg, f"of length {length}", describe(value), hint)


def check_device(op: str, arg: str, value: Tensor, device: torch.device, like: str) -> None:
    """On the device of another argument."""
    if value.device != device:
        hint = f"move it with .to({str(device)!r})"
        fail(ValueError, op, arg, f"on {device} like {like}", f"a tensor on {value.device}", hint)


def check_not_empty(op: str, arg: str, value: Tensor) -> None:
    """At least one element along the first axis."""
    if value.ndim == 0 or value.shape[0] == 0:
        fail(ValueError, op, arg, "non-empty", describe(value), "pass at least one sample")


def check_readable(op: str, arg: str, value: Tensor) -> None:
    """Not on the meta device, where there are no values to read."""
    if value.is_meta:
        hint = "load the data, then move it to a real device"
        fail(ValueError, op, arg, "on a device that holds values", "a tensor on meta", hint)


def check_range(
    op: str,
    arg: str,
    value: Tensor,
    low: int,
    high: int,
    hint: str = "look for entries out of range",
) -> None:
    """Integers in [low, high). Reads the tensor: on a GPU this waits for it."""
    if value.numel() == 0:
        return
    check_readable(op, arg, value)
    least, most = (int(x) for x in value.aminmax())
    if least < low or most >= high:
        fail(ValueError, op, arg, f"in [{low}, {high})", f"values from {least} to {most}", hint)


def check_finite(
    op: str,
    arg: str,
    value: Tensor,
    hint: str = "clean or drop them",
    *,
    first: int = 0,
) -> None:
    """No NaN, no infinity; names the bad rows, counted from `first`. On a GPU this waits."""
    check_readable(op, arg, value)
    # a sum with a NaN or infinity in it is never finite; a sum that overflows proves nothing
    if math.isfinite(value.detach().sum()) or torch.isfinite(value).all():
        return
    bad = ~torch.isfinite(value.detach().reshape(value.shape[0] if value.ndim else 1, -1)).all(1)
    rows = (bad.nonzero().flatten() + first).tolist()
    shown = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
    fail(ValueError, op, arg, "finite", f"NaN or infinity in {len(rows)} rows ({shown})", hint)


def check_choice(op: str, arg: str, value: object, choices: tuple[str, ...]) -> None:
    """One of a few strings."""
    if value not in choices:
        hint = "spell it as one of these"
        fail(ValueError, op, arg, "one of " + ", ".join(map(repr, choices)), describe(value), hint)


def check_positive_int(op: str, arg: str, value: object) -> None:
    """An int of 1 or more (bool refused)."""
    if isinstance(value, bool) or not isinstance(value, int):
        fail(TypeError, op, arg, "a positive int", describe(value), "pass a whole number")
    if value < 1:
        fail(ValueError, op, arg, "a positive int", value, "pass 1 or more")


def check_int(op: str, arg: str, value: object, *, low: int = 0, hint: str = "") -> int:
    """An int of `low` or more (bool refused)."""
    expected = f"an int of {low} or more"
    if isinstance(value, bool) or not isinstance(value, int):
        fail(TypeError, op, arg, expected, describe(value), hint or "pass a whole number")
    if value < low:
        fail(ValueError, op, arg, expected, value, hint or "pass a larger one")
    return value


def check_number(
    op: str,
    arg: str,
    value: object,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    hint: str = "",
) -> float:
    """A finite real number within bounds (str, bool, None, tensors, NaN refused)."""
    bounds = {"above": above, "at least": at_least, "below": below, "at most": at_most}
    named = [f"{name} {bound:g}" for name, bound in bounds.items() if bound is not None]
    expected = " ".join(["a finite number", " and ".join(named)]).strip()
    hint = hint or "pass a plain Python number"
    if isinstance(value, bool) or not isinstance(value, Real):
        fail(TypeError, op, arg, expected, describe(value), hint)
    number = float(value)
    if (
        not math.isfinite(number)
        or (above is not None and not number > above)
        or (at_least is not None and not number >= at_least)
        or (below is not None and not number < below)
        or (at_most is not None and not number <= at_most)
    ):
        fail(ValueError, op, arg, expected, value, hint)
    return number


def check_bool(op: str, arg: str, value: object) -> bool:
    """True or False, and nothing that merely counts as one."""
    if not isinstance(value, bool):
        fail(TypeError, op, arg, "True or False", describe(value), "pass a bool")
    return value


def check_module(op: str, arg: str, value: object) -> nn.Module:
    """An nn.Module (an object, not its class)."""
    if not isinstance(value, nn.Module):
        hint = "call the class to make one" if isinstance(value, type) else "wrap it in a module"
        fail(TypeError, op, arg, "a torch.nn.Module", describe(value), hint)
    return value


def check_callable(op: str, arg: str, value: object) -> Callable[..., Any]:
    """A function or another callable object."""
    if not callable(value):
        fail(TypeError, op, arg, "callable", describe(value), "pass the function itself")
    return value


def check_pool(op: str, labels: object, is_synthetic: object, length: int) -> tuple[Tensor, Tensor]:
    """Classes and sources of a pool, returned as int64 [length] >= 0 and bool [length]."""
    classes = check_integer(op, "labels", labels, ndim=1).long()
    check_length(op, "labels", classes, length)
    flags = check_flags(op, "is_synthetic", is_synthetic, length)
    if length:
        check_range(op, "labels", classes, 0, int(classes.max()) + 1, "number the classes from 0")
    return classes, flags


def check_path(op: str, arg: str, value: object) -> Path:
    """A str or os.PathLike that names a file."""
    if not isinstance(value, str | os.PathLike) or isinstance(os.fspath(value), bytes):
        fail(TypeError, op, arg, "a path (str or pathlib.Path)", describe(value), "name a file")
    if not os.fspath(value):
        fail(ValueError, op, arg, "a path", "an empty one", "name a file")
    return Path(value)


def check_place(op: str, arg: str, value: object) -> torch.device:
    """A device that this machine has and that holds values, by name or as a torch.device."""
    expected, hint = "a device of this machine", "pass for example 'cpu', 'cuda' or 'cuda:1'"
    if not isinstance(value, str | torch.device):
        fail(TypeError, op, arg, expected, describe(value), hint)
    try:
        device = torch.empty(0, device=value).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        fail(ValueError, op, arg, expected, f"{str(value)!r} ({reason})", hint)
    check_readable(op, arg, torch.empty(0, device=device))
    return device


def check_mapping(op: str, arg: str, value: object, hint: str) -> Mapping[Any, Any]:
    """A dict or another mapping."""
    if not isinstance(value, Mapping):
        fail(TypeError, op, arg, "a mapping", describe(value), hint)
    return value
